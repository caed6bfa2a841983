"""Makes requests: each workload's stream, and all of them merged by arrival."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fxgraft.errors import InputError
from fxgraft.runtime.hermes.request import Plan, Prefix, Request
from fxgraft.runtime.hermes.stages import DECODE_KINDS, Chain
from fxgraft.runtime.hermes.workload.arrivals import BLOCK, Closed, Trace
from fxgraft.runtime.hermes.workload.lengths import zipf_places
from fxgraft.runtime.hermes.workload.traces import TraceRows, read_trace
from fxgraft.runtime.hermes.workload.workload import Workload

ARRIVALS, LENGTHS, KEYS, BRANCHES, THINK, PREFIXES = range(6)
_PRIVATE_KEYS, _SHARED_KEYS, _PREFIX_KEYS = 1 << 52, 1 << 51, 1 << 50


class Shape(NamedTuple):
    """What one request asks for."""

    prompt: int
    output: int
    context: int
    key: int
    prefix: Prefix


class Shapes:
    """The shapes of a workload's requests, one after another.

    Args:
        workload: of the requests.
        number: of the workload.
        seed: of the system.
        trace: its rows, if it has one.
    """

    def __init__(self, workload: Workload, number: int, seed: int, trace: TraceRows | None) -> None:
        self._workload = workload
        self._number = number
        self._trace = trace if workload.has_trace else None
        self._row = 0
        self._lengths = stream(seed, number, LENGTHS)
        self._keys = stream(seed, number, KEYS)
        self._prefixes = stream(seed, number, PREFIXES)
        self._branches = stream(seed, number, BRANCHES)
        self._pending: Iterator[Shape] = iter(())
        self._decodes = [stage for stage in workload.stages() if stage.kind in DECODE_KINDS]

    def next(self) -> Shape:
        """The next request's shape."""
        shape = next(self._pending, None)
        if shape is None:
            self._pending = iter(self._block())
            shape = next(self._pending)
        return shape

    def _block(self) -> list[Shape]:
        workload = self._workload
        prompts, outputs, contexts, keys = self._columns()
        prefixes: Sequence[Prefix] = [()] * BLOCK
        if workload.prefix is not None:
            prefixes = self._shared_prefixes(prompts)
        columns = prompts.tolist(), outputs.tolist(), contexts.tolist(), keys.tolist()
        return list(map(Shape, *columns, prefixes))

    def _columns(self) -> tuple[npt.NDArray[np.int64], ...]:
        workload, random = self._workload, self._lengths
        keys = workload.keys.draw(self._keys, BLOCK)
        keys = np.where(keys >= 0, keys + _SHARED_KEYS + (self._number << 40), keys)
        if self._trace is not None:
            rows = self._rows()
            own = self._trace.key[rows]
            keys = np.where(own >= 0, own, keys)
            context = self._trace.context[rows]
            prompts, outputs = self._trace.prompt[rows], self._trace.output[rows]
        else:
            assert workload.prompt is not None
            assert workload.output is not None
            context = np.zeros(BLOCK, np.int64)
            prompts = workload.prompt.draw(random, BLOCK)
            outputs = workload.output.draw(random, BLOCK)
        if workload.context is not None:
            context = workload.context.draw(self._keys, BLOCK)
        return prompts, outputs, context, keys

    def _rows(self) -> npt.NDArray[np.int64]:
        assert self._trace is not None
        total = len(self._trace.prompt)
        lengths = self._workload.lengths
        if lengths is not None and lengths.order == "draw":
            return self._lengths.integers(0, total, BLOCK)
        rows = np.arange(self._row, self._row + BLOCK) % total
        self._row += BLOCK
        return rows

    def _shared_prefixes(self, prompts: npt.NDArray[np.int64]) -> list[Prefix]:
        prefix = self._workload.prefix
        assert prefix is not None
        if prefix.law == "zipf":
            chosen = zipf_places(self._prefixes, prefix.contents, prefix.exponent, BLOCK)
        else:
            chosen = self._prefixes.integers(0, prefix.contents, BLOCK)
        first = _PREFIX_KEYS + (self._number << 40)
        tokens = np.minimum(prompts, prefix.tokens)
        pairs = zip((chosen + first).tolist(), tokens.tolist(), strict=True)
        return [((key, length),) for key, length in pairs]

    def plan(self, output: int) -> Plan:
        """Outputs of each branch of each decode stage."""
        return tuple(
            tuple(self._branch_lengths(output * stage.scale, stage.branches, stage.spread))
            for stage in self._decodes
        )

    def _branch_lengths(self, mean: float, branches: int, spread: float) -> list[int]:
        factors = [1.0] * branches
        if spread:
            factors = (1.0 + spread * self._branches.standard_normal(branches)).tolist()
        return [max(round(mean * factor), 1) for factor in factors]


class WorkloadSource:
    """The requests of one workload, in order of arrival.

    Args:
        workload: of the requests.
        number: of the workload.
        seed: of the system.
        numbers: gives each request its index.
    """

    def __init__(self, workload: Workload, number: int, seed: int, numbers: Iterator[int]) -> None:
        self.workload = workload
        self.sorted_rows = 0
        self._number = number
        self._numbers = numbers
        trace, lengths = self._read()
        self._shapes = Shapes(workload, number, seed, lengths)
        self._left = workload.requests or (len(trace.arrival) if trace else 0)
        self._chain: Chain = workload.stages()
        self._planned = workload.is_planned()
        self._timeout = workload.timeout or float("inf")
        self._random = stream(seed, number, ARRIVALS)
        self._think = stream(seed, number, THINK)
        self._times: Iterator[float] = self._arrivals(trace)

    def _read(self) -> tuple[TraceRows | None, TraceRows | None]:
        """The traces of arrivals and of lengths, which may be one."""
        workload, arrivals = self.workload, self.workload.arrivals
        trace: TraceRows | None = None
        if isinstance(arrivals, Trace):
            trace = read_trace(arrivals.file, sort=arrivals.sort)
            self.sorted_rows = trace.sorted_rows
        lengths = trace
        if workload.lengths:
            lengths = read_trace(workload.lengths.file, arrivals=False)
        if workload.wants_context and not (lengths and lengths.has_context):
            raise InputError(
                f"workload {workload.name!r} retrieves prior context, and its trace has no column "
                "context", "add the column, or give `context`")  # fmt: skip
        return trace, lengths

    def _arrivals(self, trace: TraceRows | None) -> Iterator[float]:
        arrivals = self.workload.arrivals
        if isinstance(arrivals, Closed):
            return iter([0.0] * min(arrivals.users, self._left))
        if isinstance(arrivals, Trace):
            assert trace is not None
            self._left = min(self._left, len(trace.arrival))
            return iter((trace.arrival * arrivals.stretch).tolist())
        blocks = arrivals.blocks(self._random)
        return itertools.chain.from_iterable(block.tolist() for block in blocks)

    def next(self) -> Request | None:
        """The next request whose arrival is known."""
        if self._left == 0:
            return None
        arrival = next(self._times, None)
        return None if arrival is None else self._make(arrival)

    def _make(self, arrival: float) -> Request:
        self._left -= 1
        prompt, output, context, key, prefix = self._shapes.next()
        index = next(self._numbers)
        request = Request(
            index, arrival, prompt, output, self._chain, self.workload.model, self._number, context,
            key if key >= 0 else _PRIVATE_KEYS + index, prefix,
        )  # fmt: skip
        if self._planned:
            request.plan = self._shapes.plan(output)
        if self._timeout < float("inf"):
            request.deadline = arrival + self._timeout
        request.preferred = self.workload.preferred
        return request

    def ended(self, request: Request, now: float) -> Request | None:
        """The next request of a user who waited for this one."""
        arrivals = self.workload.arrivals
        if self._left == 0 or not isinstance(arrivals, Closed):
            return None
        think = arrivals.think
        if arrivals.law == "exponential":
            think *= float(self._think.standard_exponential())
        return self._make(now + think)


class MergedSource:
    """Several workloads as one source."""

    def __init__(self, workloads: Sequence[Workload], seed: int) -> None:
        numbers = itertools.count()
        self.parts = [
            WorkloadSource(workload, number, seed, numbers)
            for number, workload in enumerate(workloads)
        ]
        self._closed = [part.workload.is_closed for part in self.parts]
        self._any_closed = any(self._closed)
        self._heap: list[tuple[float, int, Request]] = []
        self.next: Callable[[], Request | None] = self.parts[0].next
        if len(self.parts) > 1:
            self.next = self._merged
            for part in self.parts:
                self._push(part)

    def _push(self, part: WorkloadSource) -> None:
        request = part.next()
        if request is not None:
            heapq.heappush(self._heap, (request.arrival, request.index, request))

    def _merged(self) -> Request | None:
        if not self._heap:
            return None
        request = heapq.heappop(self._heap)[2]
        self._push(self.parts[request.workload])
        return request

    def ended(self, request: Request, now: float) -> Request | None:
        """See ``WorkloadSource.ended``."""
        if self._any_closed and self._closed[request.workload]:
            return self.parts[request.workload].ended(request, now)
        return None


def stream(seed: int, workload: int, purpose: int) -> np.random.Generator:
    """The random stream of a workload for one purpose."""
    return np.random.default_rng([seed, workload, purpose])
