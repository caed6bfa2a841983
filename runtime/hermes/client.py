"""Clients: a scheduler and the hardware it runs, as the coordinator sees them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from fxgraft.runtime.hermes.log import Rows
from fxgraft.runtime.hermes.request import Request
from fxgraft.runtime.hermes.stages import Stage

STEP_COLUMNS = (
    "client", "start", "end", "steps", "first_seconds", "slope", "prefill_requests",
    "prefill_tokens", "decodes", "context", "waiting", "blocks", "joules", "clock",
)  # fmt: skip
"""A row is one step, or several alike: ``steps`` decode steps, each ``slope`` seconds longer."""


class Hub(Protocol):
    """What a client needs of the coordinator."""

    steps: Rows

    def schedule(self, client: Client, time: float) -> None:
        """Have ``client.on_step`` called at a time; replaces what was scheduled before."""
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

    Attributes:
        index: position among the system's clients; breaks ties.
        name: unique name.
        place: node and rack.
        epoch: number of the valid step event; older ones are stale.
        busy_seconds: time spent in steps.
        step_joules: energy of its steps.
        idle_watts: drawn outside steps.
        served: stages that it finished.
        dollars_per_hour: price of the hardware.
        marked_steps: steps outside the validity of their cost table.
    """

    kind = ""

    def __init__(
        self,
        index: int,
        name: str,
        hub: Hub,
        *,
        place: Place,
        idle_watts: float = 0.0,
        dollars_per_hour: float = 0.0,
    ) -> None:
        self.index = index
        self.name = name
        self.hub = hub
        self.place = place
        self.idle_watts = idle_watts
        self.dollars_per_hour = dollars_per_hour
        self.epoch = 0
        self.busy_seconds = 0.0
        self.step_joules = 0.0
        self.served = 0
        self.marked_steps = 0
        self.assigned = 0
        self.servers = 1

    @abstractmethod
    def accepts(self, stage: Stage, request: Request) -> bool:
        """Whether it can run a stage of a request."""

    @abstractmethod
    def submit(self, request: Request, now: float) -> None:
        """A request arrives."""

    @abstractmethod
    def on_step(self, now: float) -> None:
        """A scheduled moment has come: a step ends, or an idle client looks at its queue."""

    @abstractmethod
    def withdraw(self, request: Request, now: float) -> bool:
        """Take a request that still waits out of the queue; False if it has started."""

    @abstractmethod
    def load(self, measure: str, now: float) -> float:
        """Load under one of the measures of ``routing``; what is on its way here included."""

    @abstractmethod
    def waiting_for(self) -> str:
        """What keeps its requests from running, for the report of a stall."""

    def expect(self, request: Request) -> None:
        """A request was routed here and is on its way."""
        self.assigned += 1

    def release(self, request: Request) -> None:
        """The KV of a request that was handed over has left."""

    def stop(self, now: float) -> None:
        """The horizon has come: account for the part of a step that has run."""

    def idle_joules(self, seconds: float) -> float:
        """Energy of the time outside steps, for a run of ``seconds``."""
        return self.idle_watts * max(0.0, seconds - self.busy_seconds / self.servers)
