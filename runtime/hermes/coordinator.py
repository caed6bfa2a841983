"""The coordinator: global clock, event queue, routing, transfers, ends (spec section 4)."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from typing import Protocol

from fxgraft.errors import Error, InputError
from fxgraft.runtime.hermes.client import BREAK_COLUMNS, GAP_COLUMNS, STEP_COLUMNS, Client
from fxgraft.runtime.hermes.events import ARRIVAL, CALL, FLOW, STEP, TIMEOUT, EventQueue
from fxgraft.runtime.hermes.log import Array, Rows
from fxgraft.runtime.hermes.network import Network
from fxgraft.runtime.hermes.request import (
    CENSORED,
    COMPLETED,
    REJECTED,
    TERMINAL,
    TIMED_OUT,
    TRANSFER,
    Request,
)
from fxgraft.runtime.hermes.routing import RoundRobin, Router, checked, in_node
from fxgraft.runtime.hermes.sharing import Flow
from fxgraft.runtime.hermes.stages import KINDS, PREFILL, Stage
from fxgraft.runtime.hermes.totals import StepTotals
from fxgraft.runtime.hermes.transfers import Sizes, Transfers

REQUEST_COLUMNS = (
    "request", "workload", "arrival", "end", "state", "prompt", "output", "emitted",
    "first_token", "decode_seconds", "decode_gaps", "max_gap", "queue_seconds",
    "transfer_seconds", "preemptions", "recomputed", "reused", "position",
    "level",
)  # fmt: skip
STAGE_COLUMNS = ("request", "stage", "kind", "client", "assigned", "started", "ended")
LOGS = ("requests", "stages", "steps", "gaps", "breaks", "transfers")
_KIND_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
_STATE_NUMBERS = {state: number for number, state in enumerate(TERMINAL)}
_TIE = 1e-12


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
        sizes: bytes of what moves.
        horizon: seconds after which the simulation stops; what is unfinished is censored.
        local: hand over from prefill to decode only inside a node.
        keep: the logs to keep whole, of ``LOGS``.
        reduce: by log, called with each chunk of its rows.
        observer: called after each event, for tests.

    Attributes:
        now: the time in seconds.
        accepted: requests that entered.
        ended: number of requests by terminal state.
        live: requests that entered and have not ended.
        reasons: why requests were rejected, by index.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        source: Source,
        *,
        routers: Mapping[str, Router] | None = None,
        network: Network | None = None,
        sizes: Sizes | None = None,
        horizon: float = math.inf,
        local: bool = False,
        keep: frozenset[str] = frozenset(LOGS),
        reduce: Mapping[str, Callable[[Array], None]] | None = None,
        observer: Callable[[Coordinator], None] | None = None,
    ) -> None:
        reducers = dict(reduce or {})
        self.totals = StepTotals(len(clients), reducers.get("steps"))
        reducers["steps"] = self.totals.add

        def rows(name: str, columns: tuple[str, ...]) -> Rows:
            return Rows(columns, keep=name in keep, reduce=reducers.get(name))

        self.clients = list(clients)
        self.source = source
        self.network = network or Network()
        self.horizon = horizon
        self.local = local
        self.requests = rows("requests", REQUEST_COLUMNS)
        self.stages = rows("stages", STAGE_COLUMNS)
        self.steps = rows("steps", STEP_COLUMNS)
        self.gaps = rows("gaps", GAP_COLUMNS)
        self.breaks = rows("breaks", BREAK_COLUMNS)
        self.transfers = self.network.rows = rows("transfers", self.network.rows.columns)
        self.now = 0.0
        self.accepted = 0
        self.ended: dict[str, int] = dict.fromkeys(map(str, TERMINAL), 0)
        self.live: dict[Request, None] = {}
        self.reasons: dict[int, str] = {}
        self.events = EventQueue()
        self._sender = Transfers(self.network, self.events, sizes or Sizes())
        self.share = self._sender.share
        self.number_of_events = 0
        self._routers = dict(routers or {})
        self._default_router: Router = self._routers.get("") or RoundRobin()
        self._candidates: dict[tuple[str, str, str], list[Client]] = {}
        self._observer = observer
        self._upcoming = self._limit = math.inf
        self._tie = math.inf, math.inf
        self._stepping = ""
        for index, client in enumerate(self.clients):
            client.attach(index, self)

    # -- the loop

    def run(self) -> None:
        """Simulate until every request has ended, or the horizon.

        Raises:
            Error: nothing can happen any more although requests are left; says who waits for what.
            InputError: a step lies outside the validity of its client's cost table.
        """
        was_enabled = gc.isenabled()
        gc.disable()  # requests are freed by their reference counts; passes over them cost 6 %
        try:
            self._run()
        except InputError as error:  # a price outside its table
            raise InputError(
                f"client {self._stepping}, at {self.now:g} s: {error.problem}", error.remedy
            ) from error
        finally:
            if was_enabled:
                gc.enable()
        self._close()

    def _run(self) -> None:
        heap, horizon, observer = self.events.heap, self.horizon, self._observer
        upcoming = self._next()
        number = 0
        while True:
            if upcoming is not None and (not heap or heap[0][0] >= upcoming.arrival):
                if upcoming.arrival > horizon:
                    break
                self.now = upcoming.arrival
                entering, upcoming = upcoming, self._next()
                self._enter(entering)
            elif heap:
                time, kind, _, subject, detail = heappop(heap)
                if time > horizon:
                    break
                if kind == STEP:
                    if subject.epoch == detail:
                        number += self._step(subject, time)
                    continue
                self.now = time
                self._handle(kind, subject, detail)
            else:
                self._check_stall()
                break
            number += 1
            if observer is not None:
                observer(self)
        self.number_of_events += number

    def _step(self, client: Client, time: float) -> int:
        """Let a client run steps as long as nothing else happens in between; returns how many."""
        heap, limit, observer = self.events.heap, self._limit, self._observer
        number = 0
        self._stepping = client.name
        while True:
            self.now = time
            number += 1
            until = limit
            if heap and heap[0][0] < until:
                until = heap[0][0]
            following = client.on_step(time, until)
            if observer is not None:
                observer(self)
            if following is None:
                return number
            client.epoch += 1  # what was scheduled before does not count
            if following >= limit or (heap and heap[0][0] <= following):
                if self._tie[0] <= following <= self._tie[1]:
                    following = self._upcoming  # one moment, computed by sums in another order
                events = self.events
                events.number += 1
                heappush(heap, (following, STEP, events.number, client, client.epoch))
                return number
            time = following

    def _next(self) -> Request | None:
        upcoming = self.source.next()
        self._upcoming = upcoming.arrival if upcoming is not None else math.inf
        before = self._upcoming * (1.0 - _TIE)
        self._tie = before, self._upcoming * (1.0 + _TIE)
        self._limit = before if before < self.horizon else self.horizon
        return upcoming

    def _handle(self, kind: int, subject: object, detail: object) -> None:
        if kind == ARRIVAL and isinstance(subject, Request):
            if detail is None:
                self._enter(subject)
            else:
                self._deliver(subject)
        elif kind == TIMEOUT and isinstance(subject, Request):
            self._time_out(subject)
        elif kind == FLOW and isinstance(subject, Flow) and subject.epoch == detail:
            self.share.end(subject, self.now)
        elif kind == CALL and callable(subject):
            subject(self.now)

    def _close(self) -> None:
        """The end: what is left did not finish in time."""
        if self.live:
            self.now = self.horizon
        for client in self.clients:
            client.stop(self.now)
        self.steps.flush()
        for client, sums in zip(self.clients, self.totals.sums.tolist(), strict=True):
            steps, client.busy_seconds, client.step_joules = sums
            client.steps_run = int(steps)
        for request in list(self.live):
            request.total_emitted += request.so_far()
            if request.emitted > 1:
                request.decode_span += request.last_token - request.stage_first
                request.decode_gaps += request.emitted - 1
            self._end(request, CENSORED)

    def _check_stall(self) -> None:
        if not self.live:
            return
        waits = [f"{c.name}: {text}" for c in self.clients if (text := c.waiting_for())]
        first = next(iter(self.live))
        stage = first.chain[first.position].kind
        raise Error(
            f"the simulation is stuck at {self.now:g} s: {len(self.live)} requests are left and "
            f"nothing can happen; request {first.index} is {first.state} at stage "
            f"{first.position + 1} ({stage}); {'; '.join(waits) or 'no client has it'}",
            "see who waits for what; a scheduler or router of your own may have lost a request",
        )

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
                _STATE_NUMBERS[state], request.asked, request.wanted(),
                request.total_emitted, request.first_token, request.decode_span,
                request.decode_gaps, request.max_gap, request.queue_time, request.transfer_time,
                request.preemptions, request.recomputed, request.reused, request.position,
                request.level,
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
        """A request's deadline has come: it gives up if it waits and has no token yet."""
        client = request.client
        if request not in self.live or client is None or request.first_token >= 0:
            return
        if request.state != TRANSFER and client.withdraw(request, self.now):
            self._end(request, TIMED_OUT)

    # -- stages

    def schedule(self, client: Client, time: float) -> None:
        """Have ``client.on_step`` called at a time; replaces what was scheduled before."""
        if self._tie[0] <= time <= self._tie[1]:
            time = self._upcoming  # one moment, computed by sums in another order
        client.epoch += 1
        events = self.events
        events.number += 1
        heappush(events.heap, (time, STEP, events.number, client, client.epoch))

    def call(self, time: float, callback: Callable[[float], None]) -> None:
        """Have a function called with the time at a time."""
        self.events.push(time, CALL, callback)

    def log_stage(self, request: Request, started: float, ended: float) -> None:
        """Record the end of the present stage."""
        client = request.client
        self.stages.append(
            (
                request.index, request.position,
                _KIND_NUMBERS[request.chain[request.position].kind],
                client.index if client else -1, request.assigned, started, ended,
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

    def candidates(self, stage: Stage, model: str) -> list[Client]:
        """The clients that can run a stage of a request for a model."""
        key = stage.kind, stage.task, stage.model or model
        found = self._candidates.get(key)
        if found is None:
            found = [client for client in self.clients if client.accepts(stage, model)]
            self._candidates[key] = found
        return found

    def _begin_stage(self, request: Request) -> None:
        stage = request.chain[request.position]
        request.prompt += stage.tokens
        if stage.kind == PREFILL:
            request.decodes = request.decodes_next()
            if request.plan and request.decodes:
                request.use_plan()
        candidates: Sequence[Client] = self.candidates(stage, request.model)
        if self.local and request.handed_over and request.previous:
            candidates = in_node(request.previous.place.node, candidates)
        if not candidates:
            self._release(request)
            reason = f"no client can run its stage {request.position + 1} ({stage.kind})"
            self.reject(request, reason, self.now)
            return
        if len(candidates) == 1:
            client = candidates[0]
        else:
            router = self._routers.get(stage.kind, self._default_router)
            client = checked(router, stage.kind, request, candidates, self.now)
        previous = request.previous
        request.client = client
        request.assigned = self.now
        request.started = -1.0
        client.expect(request)
        if previous is None or previous is client or self.network.is_free:
            self._deliver(request)
        elif not self._sender.send(request, previous, client, stage, self.now):
            client.forget(request)
            self._release(request)
            reason = f"no link leads from {previous.name!r} to {client.name!r}"
            self.reject(request, reason, self.now)

    def _deliver(self, request: Request) -> None:
        """A request has reached the client of its present stage."""
        now, client = self.now, request.client
        assert client is not None
        request.arrived = now
        if request.state == TRANSFER:
            request.transfer_time += now - request.assigned
        self._release(request)
        if now > request.deadline and request.first_token < 0:
            client.forget(request)
            self._end(request, TIMED_OUT)
        else:
            client.submit(request, now)

    def _release(self, request: Request) -> None:
        """The KV of a request that was handed over is no longer needed where it was made."""
        if request.handed_over and request.previous is not None:
            request.previous.release(request, self.now)
