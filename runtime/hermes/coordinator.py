"""The coordinator: global clock, event queue, routing, transfers, ends (spec section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from fxgraft.errors import Error
from fxgraft.runtime.hermes.client import STEP_COLUMNS, Client
from fxgraft.runtime.hermes.events import ARRIVAL, FLOW, STEP, TIMEOUT, EventQueue
from fxgraft.runtime.hermes.llm.client import LlmClient
from fxgraft.runtime.hermes.log import Array, Rows
from fxgraft.runtime.hermes.network import Flow, Network, Path, visible_bytes
from fxgraft.runtime.hermes.request import (
    CENSORED,
    COMPLETED,
    REJECTED,
    TERMINAL,
    TIMED_OUT,
    TRANSFER,
    Request,
)
from fxgraft.runtime.hermes.routing import RoundRobin, Router, checked, near
from fxgraft.runtime.hermes.stages import DECODE_KINDS, KV_RETRIEVAL, RAG_KINDS, Stage

REQUEST_COLUMNS = (
    "request", "workload", "arrival", "end", "state", "prompt", "output", "emitted",
    "first_token", "decode_seconds", "decode_gaps", "max_gap", "queue_seconds",
    "transfer_seconds", "preemptions", "recomputed", "reused",
)  # fmt: skip
STAGE_COLUMNS = ("request", "stage", "client", "assigned", "started", "ended")
_TOKEN_ID_BYTES = 4.0


class Source(Protocol):
    """Where requests come from, in order of arrival."""

    def next(self) -> Request | None:
        """The next request whose arrival is known, or None."""
        ...

    def ended(self, request: Request, now: float) -> Request | None:
        """A request reached its end; a user who waited for it may send another one."""
        ...


class Coordinator:
    """Runs requests through clients.

    Args:
        clients: in the order of their indices.
        source: of requests.
        routers: by stage kind; ``""`` is for all others.
        network: links between clients.
        horizon: seconds after which the simulation stops; what is unfinished is censored.
        local: hand over from prefill to decode only inside a node.
        layers: of each model whose KV leaves layer by layer while the prefill goes on.
        text_bytes: per token of retrieved text.
        stages, steps: logs.
        requests: log of ended requests.
        observer: called after each event, for tests.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        source: Source,
        *,
        routers: Mapping[str, Router] | None = None,
        network: Network | None = None,
        horizon: float = math.inf,
        local: bool = False,
        layers: Mapping[str, int] | None = None,
        text_bytes: float = _TOKEN_ID_BYTES,
        keep: frozenset[str] = frozenset({"requests", "stages", "steps"}),
        observer: Callable[[Coordinator], None] | None = None,
    ) -> None:
        self.clients = list(clients)
        self.source = source
        self.network = network or Network()
        self.network.schedule = self._schedule_flow
        self.network.rows.wanted = self.network.rows.keep = "transfers" in keep
        self.horizon = horizon
        self.local = local
        self.layers = layers or {}
        self.text_bytes = text_bytes
        self.requests = Rows(REQUEST_COLUMNS, keep="requests" in keep)
        self.stages = Rows(STAGE_COLUMNS, keep="stages" in keep)
        self.steps = Rows(STEP_COLUMNS, keep="steps" in keep)
        self.now = 0.0
        self.accepted = 0
        self.ended = dict.fromkeys(TERMINAL, 0)
        self.live: dict[Request, None] = {}
        self.reasons: dict[int, str] = {}
        self.events = EventQueue()
        self.number_of_events = 0
        self._routers = dict(routers or {})
        self._default_router: Router = self._routers.get("", RoundRobin())
        self._candidates: dict[tuple[Stage, str], list[Client]] = {}
        self._observer = observer
        self._workload_states: Array | None = None

    # -- the loop

    def run(self) -> None:
        """Simulate until every request has ended, or the horizon.

        Raises:
            Error: nothing can happen any more although requests are left; says who waits for what.
        """
        heap, pop = self.events.heap, self.events.pop
        observer = self._observer
        upcoming = self.source.next()
        while True:
            if upcoming is not None and (not heap or heap[0][0] >= upcoming.arrival):
                time = upcoming.arrival
                if time > self.horizon:
                    break
                self.now = time
                self._enter(upcoming)
                upcoming = self.source.next()
            elif heap:
                time, kind, _, subject, detail = pop()
                if time > self.horizon:
                    break
                self.now = time
                if kind == STEP:
                    if subject.epoch != detail:
                        continue
                    subject.on_step(time)
                else:
                    self._handle(kind, subject, detail)
            else:
                break
            self.number_of_events += 1
            if observer is not None:
                observer(self)
        self._close()

    def _handle(self, kind: int, subject: object, detail: object) -> None:
        if kind == ARRIVAL and isinstance(subject, Request):
            if detail is None:
                self._enter(subject)
            else:
                self._deliver(subject)
        elif kind == TIMEOUT and isinstance(subject, Request):
            self._time_out(subject)
        elif kind == FLOW and isinstance(subject, Flow) and subject.epoch == detail:
            self.network.end(subject, self.now)
            self.events.push(self.now + subject.path.latency, ARRIVAL, subject.subject, True)

    def _close(self) -> None:
        if not math.isfinite(self.horizon) and self.live:
            raise Error("the simulation is stuck: " + self._stall(), "see who waits for what")
        if math.isfinite(self.horizon):
            self.now = self.horizon if self.live else self.now
            for client in self.clients:
                client.stop(self.now)
        for request in list(self.live):
            request.total_emitted += request.emitted * request.live
            self._end(request, CENSORED)

    def _stall(self) -> str:
        waits = [f"{c.name}: {text}" for c in self.clients if (text := c.waiting_for())]
        first = next(iter(self.live))
        return (f"{len(self.live)} requests are left and no event; request {first.index} is "
                f"{first.state} at stage {first.position}; {'; '.join(waits)}")  # fmt: skip

    # -- requests in and out

    def _enter(self, request: Request) -> None:
        self.accepted += 1
        self.live[request] = None
        request.asked = request.prompt
        if request.deadline < math.inf:
            self.events.push(request.deadline, TIMEOUT, request)
        self._begin_stage(request)

    def _end(self, request: Request, state: str) -> None:
        request.state = state
        del self.live[request]
        self.ended[state] += 1
        self.requests.append(
            (
                request.index, request.workload, request.arrival, self.now,
                TERMINAL.index(state), request.asked,
                request.output if not request.branch_outputs else sum(request.branch_outputs),
                request.total_emitted, request.first_token, request.decode_span,
                request.decode_gaps, request.max_gap, request.queue_time, request.transfer_time,
                request.preemptions, request.recomputed, request.reused,
            )
        )  # fmt: skip
        following = self.source.ended(request, self.now)
        if following is not None:
            self.events.push(following.arrival, ARRIVAL, following)

    def reject(self, request: Request, reason: str, now: float) -> None:
        """A request can never run."""
        self.reasons[request.index] = reason
        self._end(request, REJECTED)

    def _time_out(self, request: Request) -> None:
        client = request.client
        if request not in self.live or client is None:
            return
        if request.state != TRANSFER and client.withdraw(request, self.now):
            self._end(request, TIMED_OUT)

    # -- stages

    def schedule(self, client: Client, time: float) -> None:
        """Have ``client.on_step`` called at a time; replaces what was scheduled before."""
        client.epoch += 1
        self.events.push(time, STEP, client, client.epoch)

    def log_stage(self, request: Request, started: float, ended: float) -> None:
        """Record the end of the present stage."""
        if self.stages.wanted:
            client = request.client
            self.stages.append(
                (
                    request.index, request.position, client.index if client else -1,
                    request.assigned, started, ended,
                )
            )  # fmt: skip

    def finish_stage(self, request: Request, now: float) -> None:
        """A request ended its present stage: send it to the next one, or record its end."""
        self.log_stage(request, request.started, now)
        request.previous = request.client
        request.position += 1
        if request.position == len(request.chain):
            self._end(request, COMPLETED)
        elif now > request.deadline and request.first_token < 0:
            self._end(request, TIMED_OUT)
        else:
            self._begin_stage(request)

    def candidates(self, stage: Stage, request: Request) -> list[Client]:
        """The clients that can run a stage of a request."""
        key = stage, request.model
        found = self._candidates.get(key)
        if found is None:
            found = [client for client in self.clients if client.accepts(stage, request)]
            self._candidates[key] = found
        return found

    def _begin_stage(self, request: Request) -> None:
        stage = request.chain[request.position]
        request.prompt += stage.tokens
        candidates = self.candidates(stage, request)
        if self.local and request.handed_over:
            candidates = [c for c in near(request, candidates)
                          if request.previous and c.place.node == request.previous.place.node]  # fmt: skip
        if not candidates:
            self._release(request)
            reason = f"no client can run its stage {request.position + 1} ({stage.kind})"
            self.reject(request, reason, self.now)
            return
        router = self._routers.get(stage.kind, self._default_router)
        if len(candidates) == 1:
            client = candidates[0]
        else:
            client = checked(router, stage.kind, request, candidates, self.now)
        previous = request.previous
        request.client = client
        request.assigned = self.now
        request.started = -1.0
        client.expect(request)
        if previous is None or previous is client or self.network.is_free:
            self._deliver(request)
        else:
            self._send(request, previous, client, stage)

    def _deliver(self, request: Request) -> None:
        """A request has reached the client of its present stage."""
        now = self.now
        request.arrived = now
        if request.state == TRANSFER:
            request.transfer_time += now - request.assigned
        self._release(request)
        client = request.client
        assert client is not None
        client.submit(request, now)

    def _release(self, request: Request) -> None:
        """The KV of a request that was handed over is no longer needed where it was made."""
        previous = request.previous
        if request.handed_over and isinstance(previous, LlmClient):
            previous.release(request)
            previous.resume(self.now)

    # -- transfers

    def _send(self, request: Request, source: Client, target: Client, stage: Stage) -> None:
        path = self.network.path(source, target)
        if path is None:
            self._release(request)
            self.reject(request, f"no link from {source.name!r} to {target.name!r}", self.now)
            return
        request.state = TRANSFER
        size = self._visible(request, path, source, self._bytes(request, target, stage))
        if self.network.shared and size > 0 and path.links:
            self.network.start(request, path, size, self.now)
            self.network.log((request.index, source.index, target.index, self.now, -1, size), path)
            return
        end = self.now + path.latency + size / path.rate
        self.network.log((request.index, source.index, target.index, self.now, end, size), path)
        self.events.push(end, ARRIVAL, request, True)

    def _visible(self, request: Request, path: Path, source: Client, size: float) -> float:
        layers = self.layers.get(request.model, 0) if request.handed_over else 0
        if layers < 2 or not isinstance(source, LlmClient):
            return size
        overlap = request.stage_first - request.prefill_started
        return visible_bytes(size, path.rate, layers, overlap)

    def _bytes(self, request: Request, target: Client, stage: Stage) -> float:
        """Bytes of a transition, by what was done before (spec section 5.2)."""
        before = request.chain[request.position - 1]
        if before.kind in DECODE_KINDS:
            return _TOKEN_ID_BYTES * request.prompt
        if stage.kind in DECODE_KINDS and isinstance(request.previous, LlmClient):
            return request.prompt * request.previous.kv_bytes
        if before.kind == KV_RETRIEVAL and isinstance(target, LlmClient):
            return request.loaded * target.kv_bytes
        if before.kind in RAG_KINDS:
            return request.prompt * self.text_bytes
        return _TOKEN_ID_BYTES * request.prompt

    def _schedule_flow(self, time: float, flow: Flow, epoch: int) -> None:
        self.events.push(time, FLOW, flow, epoch)


def unroutable(
    chains: Iterable[tuple[Request, str]], coordinator: Coordinator
) -> str:  # fmt: skip
    """The first stage of a sample request that no client can run, or ``""``."""
    for request, owner in chains:
        for position, stage in enumerate(request.chain, 1):
            if not coordinator.candidates(stage, request):
                model = stage.model or request.model
                return f"{owner}: no client can run stage {position} ({stage.kind}, {model!r})"
    return ""
