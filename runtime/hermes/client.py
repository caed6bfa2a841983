"""Clients: a scheduler and the hardware it runs, as the coordinator sees them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fxgraft.runtime.hermes.log import Rows
from fxgraft.runtime.hermes.request import Request
from fxgraft.runtime.hermes.sharing import FairShare
from fxgraft.runtime.hermes.stages import Stage

STEP_COLUMNS = (
    "client", "start", "end", "steps", "first_seconds", "slope", "prefill_requests",
    "prefill_tokens", "decodes", "context", "waiting", "blocks", "joules", "gap", "older",
)  # fmt: skip
"""A row is one step, or several decode steps, each ``slope`` seconds longer than the one before.

Clients other than those of language models count the requests of a step as ``prefill_requests``.
``gap`` is the time between the last decode step of the client and the first of this row, and
``older`` the number of queries that took part in both.
"""
GAP_COLUMNS = ("client", "seconds", "queries")
"""Gaps between tokens that no step row has: the first after a prompt, a move or a preemption."""
BREAK_COLUMNS = ("request", "client", "stopped", "resumed", "recomputed")
"""Preemptions of decodes; one that recomputes emits a token when it resumes."""


class Hub(Protocol):
    """What a client needs of the coordinator."""

    steps: Rows
    gaps: Rows
    breaks: Rows
    share: FairShare

    def schedule(self, client: Client, time: float) -> None:
        """Have ``client.on_step`` called at a time; replaces what was scheduled before."""
        ...

    def call(self, time: float, callback: Callable[[float], None]) -> None:
        """Have a function called with the time at a time."""
        ...

    def finish_stage(self, request: Request, now: float) -> None:
        """A request ended its present stage."""
        ...

    def reject(self, request: Request, reason: str, now: float) -> None:
        """A request can never run on its client."""
        ...

    def log_stage(self, request: Request, started: float, ended: float) -> None:
        """Record a stage that ends inside a client, before ``position`` moves on."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a client stands: nodes are numbered through all racks."""

    node: int = 0
    rack: int = 0


class Client(ABC):
    """Base of all clients.

    Args:
        name: unique name.
        place: node and rack.
        idle_watts: drawn outside steps.
        dollars_per_hour: price of the hardware.

    Attributes:
        index: position among the system's clients; breaks ties.
        hub: the coordinator.
        epoch: number of the valid step event; older ones are stale.
        steps_run: number of its steps, known when the simulation has ended.
        busy_seconds: time spent in them, of all servers together, known then.
        step_joules: their energy, known then.
        served: stages that it finished.
        assigned: requests that were routed here and have not left.
        servers: steps that can run at one time.
        marked_steps: steps outside the validity of their cost table.
        kv_bytes: keys and values per token, for transfers.
        vector_bytes: of a query's embedding, for transfers.
    """

    __slots__ = (
        "assigned", "busy_seconds", "dollars_per_hour", "epoch", "hub", "idle_watts", "index",
        "kv_bytes", "marked_steps", "name", "place", "served", "servers", "step_joules",
        "steps_run", "vector_bytes",
    )  # fmt: skip
    kind = ""

    def __init__(
        self,
        name: str,
        *,
        place: Place | None = None,
        idle_watts: float = 0.0,
        dollars_per_hour: float = 0.0,
    ) -> None:
        self.index: int = -1
        self.name = name
        self.place = place or Place()
        self.idle_watts = idle_watts
        self.dollars_per_hour = dollars_per_hour
        self.epoch: int = 0
        self.steps_run: int = 0
        self.busy_seconds: float = 0.0
        self.step_joules: float = 0.0
        self.served: int = 0
        self.assigned: int = 0
        self.servers: int = 1
        self.marked_steps: int = 0
        self.kv_bytes: float = 0.0
        self.vector_bytes: float = 0.0
        self.hub: Hub

    def attach(self, index: int, hub: Hub) -> None:
        """Join a system."""
        self.index = index
        self.hub = hub

    @abstractmethod
    def accepts(self, stage: Stage, model: str) -> bool:
        """Whether it can run a stage of a request for a model."""

    @abstractmethod
    def submit(self, request: Request, now: float) -> None:
        """A request arrives."""

    @abstractmethod
    def on_step(self, now: float, until: float) -> float | None:
        """A scheduled moment has come: a step ends, or an idle client looks at its queue.

        Args:
            now: the moment.
            until: nothing else happens in the system before; the client may run ahead up to there
                as long as it does not end a stage.

        Returns:
            When to be called again; None to wait for a request.
        """

    @abstractmethod
    def withdraw(self, request: Request, now: float) -> bool:
        """Take a request that still waits out of the queue; False if it has started."""

    @abstractmethod
    def waiting_for(self) -> str:
        """What keeps its requests from running, for the report of a stall; "" if nothing waits."""

    def load(self, measure: str, now: float) -> float:
        """Load under one of the measures of ``routing``; what is on its way here included."""
        return self.assigned

    def expect(self, request: Request) -> None:
        """A request was routed here and is on its way."""
        self.assigned += 1

    def forget(self, request: Request) -> None:
        """A request that was expected, or withdrawn, will not run here."""
        self.assigned -= 1

    def release(self, request: Request, now: float) -> None:  # noqa: B027
        """The KV of a request that was handed over has left."""

    def stop(self, now: float) -> None:  # noqa: B027
        """The horizon has come: account for the part of a step that has run."""

    def idle_joules(self, seconds: float) -> float:
        """Energy of the time outside steps, for a run of ``seconds``."""
        return self.idle_watts * max(0.0, seconds - self.busy_seconds / self.servers)
