"""The sequences that decode together, without work per token (HERMES section 4.1 of the spec).

All of them advance in every decode step, so one *decode clock* counts for all. What a sequence
needs to remember is when it joined; its length, its blocks and its end follow from the clock. The
sums over sequences (queries, context, blocks needed next) are kept up to date, and a jump over
many steps costs as much as one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from heapq import heappop, heappush

from fxgraft.runtime.hermes.llm.blocks import blocks_for
from fxgraft.runtime.hermes.log import Rows
from fxgraft.runtime.hermes.request import Request

NEVER = 1 << 62


class Decodes(ABC):
    """Running decodes of one client.

    Attributes:
        count: query tokens of a decode step; a request with B live branches has B.
        context: keys that the next decode step reads, each query's own token included.
        clock: decode steps done so far.
        due: blocks to allocate before the next decode step.
        next_end: the clock at which the first branch has emitted its last token, or earlier.
        block_size: tokens per block.
        last_end: when the last decode step ended, in seconds.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.count: int = 0
        self.context: int = 0
        self.clock: int = 0
        self.due: int = 0
        self.next_end: int = NEVER
        self.last_end: float = 0.0
        self._rows: Rows | None = None
        self._client = 0

    def log_gaps(self, rows: Rows, client: int) -> None:
        """Where gaps are logged that ``advance`` does not return, see ``GAP_COLUMNS``."""
        self._rows = rows if rows.wanted else None
        self._client = client

    @abstractmethod
    def join(self, request: Request) -> None:
        """Add a request that has just emitted, or brought, its ``emitted``-th token."""

    @abstractmethod
    def drop(self, request: Request) -> None:
        """Take a request out before its end; brings its ``emitted`` up to date."""

    @abstractmethod
    def needed_by(self, request: Request) -> int:
        """Blocks of ``due`` that are for one request."""

    @abstractmethod
    def held_by(self, request: Request) -> int:
        """Blocks that a request holds now."""

    @abstractmethod
    def emitted_by(self, request: Request) -> int:
        """Tokens that each live branch of a request has emitted."""

    @abstractmethod
    def keep_layers(self, request: Request, layers: int) -> int:
        """A request keeps keys and values of so many layers from now on; returns freed blocks."""

    @abstractmethod
    def jump(self, free: int, limit: int) -> int:
        """Decode steps until the first end of a branch, or until ``free`` blocks do not do."""

    @abstractmethod
    def allocate(self, steps: int) -> int:
        """Blocks that these many next steps allocate."""

    @abstractmethod
    def advance(
        self, steps: int, start: float, first: float, slope: float, end: float
    ) -> tuple[float, int]:
        """The next ``steps`` decode steps have run back to back.

        Args:
            steps: at least 1.
            start, end: of all of them, in seconds.
            first: duration of the first.
            slope: by how much each takes longer than the one before.

        Returns:
            The gap from the decode step before to the end of the first of these, in seconds, and
            how many queries had it. The gaps of the others are logged.
        """

    @abstractmethod
    def ended(self, now: float) -> list[tuple[Request, int, bool]]:
        """Take out branches that emitted their last token.

        Returns:
            The request, its freed blocks, and whether it was its last branch.
        """

    @abstractmethod
    def sync(self, request: Request) -> None:
        """Bring a request's ``emitted`` and ``max_gap`` up to date."""

    @abstractmethod
    def pending_output(self) -> int:
        """Tokens still to be emitted by all of them."""


class JumpingDecodes(Decodes):
    """Decodes whose bookkeeping is independent of the number of tokens."""

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        # New blocks by the clock (modulo the block size) at which they are needed, twice.
        self._due = [0] * (2 * block_size)
        # Blocks that all of them need in ``block_size`` steps.
        self._round: int = 0
        self._ends: list[tuple[int, int, int, Request]] = []
        self._fresh: list[Request] = []
        # The largest gaps since any clock, and their clocks: gaps fall, clocks rise. The first is
        # larger than all, so that the lists are never empty.
        self._gaps: list[float] = [math.inf]
        self._clocks: list[int] = [-1]
        self._end_sum: int = 0

    def join(self, request: Request) -> None:
        """Add its queries to the sums, and its ends to the heap."""
        emitted = request.emitted
        clock, branches = self.clock, request.live
        request.base, request.joined = emitted, clock
        self.count += branches
        self.context += branches * (request.prompt + emitted)
        self._mark(request, branches)
        self._fresh.append(request)
        for output in request.branch_outputs or (request.output,):
            if output > emitted:
                end = clock - emitted + output
                self._end_sum += end
                heappush(self._ends, (end, request.index, request.incarnation, request))
                if end < self.next_end:
                    self.next_end = end

    def _mark(self, request: Request, branches: int) -> None:
        """Count when these queries need new blocks (negative: no more)."""
        size = self.block_size
        own = request.base - 1
        if not request.branch_outputs:
            own += request.prompt
        place, due = (request.joined - own) % size, self._due
        blocks = branches * request.kv_layers
        due[place] += blocks
        due[place + size] += blocks
        self._round += blocks
        self.due = due[self.clock % size]

    def emitted_by(self, request: Request) -> int:
        """By the clock."""
        return request.base + self.clock - request.joined

    def keep_layers(self, request: Request, layers: int) -> int:
        """Take it out of the sums of blocks and put it in again."""
        before = self.held_by(request)
        self._mark(request, -request.live)
        request.kv_layers = layers
        self._mark(request, request.live)
        return before - self.held_by(request)

    def drop(self, request: Request) -> None:
        """Take its queries out of the sums; its entry in the heap becomes stale."""
        self.sync(request)
        self._mark_off(request, request.live)
        request.incarnation += 1
        for output in request.outputs():
            if output > request.emitted:
                self._end_sum -= request.joined - request.base + output
        self._find_next_end()

    def _mark_off(self, request: Request, branches: int) -> None:
        self.count -= branches
        self.context -= branches * (request.prompt + request.emitted)
        self._mark(request, -branches)

    def _find_next_end(self) -> None:
        ends = self._ends
        while ends and ends[0][2] != ends[0][3].incarnation:
            heappop(ends)
        self.next_end = ends[0][0] if ends else NEVER

    def needed_by(self, request: Request) -> int:
        """One for each branch whose last block is full."""
        own = self.emitted_by(request) - 1
        if not request.branch_outputs:
            own += request.prompt
        return 0 if own % self.block_size else request.live * request.kv_layers

    def held_by(self, request: Request) -> int:
        """By its length."""
        return decode_blocks(request, self.emitted_by(request), self.block_size)

    def jump(self, free: int, limit: int) -> int:
        """To the next end, if the blocks last."""
        steps = min(limit, self.next_end - self.clock)
        size, each = self.block_size, self._round
        if (steps // size + 1) * each <= free:
            return steps
        rounds = min(free // each, steps // size)
        left = free - rounds * each
        done, clock = rounds * size, self.clock % size
        while done < steps and self._due[clock] <= left:
            left -= self._due[clock]
            clock = clock + 1 if clock + 1 < size else 0
            done += 1
        return done

    def allocate(self, steps: int) -> int:
        """Whole rounds, in which every query takes a block, and the rest by due clocks."""
        size = self.block_size
        start = self.clock % size
        return steps // size * self._round + sum(self._due[start : start + steps % size])

    def advance(
        self, steps: int, start: float, first: float, slope: float, end: float
    ) -> tuple[float, int]:
        """Move the clock; remember the largest gaps."""
        first_end = end if steps == 1 else start + first
        last = gap = first_end - self.last_end
        if steps > 1:
            last = first + slope * (steps - 1 if slope >= 0.0 else 1)
            if gap > last:
                self._remember(gap, self.clock + 1)
        self.clock = clock = self.clock + steps
        gaps = self._gaps
        if last < gaps[-1]:
            gaps.append(last)
            self._clocks.append(clock)
        else:
            self._remember(last, clock)
        count = self.count
        self.due = self._due[clock % self.block_size]
        self.context += steps * count
        self.last_end = end
        return gap, count - self._greet(first_end) if self._fresh else count

    def _remember(self, gap: float, clock: int) -> None:
        """Add a gap; it hides those before that are not larger."""
        gaps, clocks = self._gaps, self._clocks
        while gaps[-1] <= gap:
            gaps.pop()
            clocks.pop()
        gaps.append(gap)
        clocks.append(clock)

    def _greet(self, first_end: float) -> int:
        """The first decode step of those that joined has ended; returns their queries."""
        queries, rows = 0, self._rows
        for request in self._fresh:
            gap = first_end - request.last_token
            if gap > request.max_gap:
                request.max_gap = gap
            queries += request.live
            if rows is not None:
                rows.append((self._client, gap, request.live))
        self._fresh.clear()
        return queries

    def _settle(self, request: Request) -> None:
        """Fold the gaps after its first decode step into ``max_gap``."""
        place = bisect_left(self._clocks, request.joined + 2)
        if place < len(self._gaps) and self._gaps[place] > request.max_gap:
            request.max_gap = self._gaps[place]

    def ended(self, now: float) -> list[tuple[Request, int, bool]]:
        """Pop the heap of ends up to the clock."""
        found: list[tuple[Request, int, bool]] = []
        ends, clock = self._ends, self.clock
        while ends and ends[0][0] <= clock:
            end, _, incarnation, request = heappop(ends)
            if incarnation != request.incarnation:
                continue
            self._end_sum -= end
            request.emitted = request.base + clock - request.joined
            self._mark_off(request, 1)
            freed = branch_blocks(request, request.emitted, self.block_size)
            request.live -= 1
            if request.live == 0:
                self._settle(request)
                request.incarnation += 1
                request.last_token = now
            found.append((request, freed, request.live == 0))
        self._find_next_end()
        return found

    def sync(self, request: Request) -> None:
        """From the clock."""
        if self.clock > request.joined:
            request.last_token = self.last_end
            self._settle(request)
        elif request in self._fresh:
            self._fresh.remove(request)
        request.emitted = self.emitted_by(request)

    def pending_output(self) -> int:
        """Ends minus the clock."""
        return self._end_sum - self.clock * self.count


def decode_blocks(request: Request, emitted: int, size: int) -> int:
    """Blocks of a decoding request whose live branches have emitted so many tokens.

    The last emitted token has no keys and values yet. Branches share the blocks of the prompt.
    """
    if not request.branch_outputs:
        return blocks_for(request.prompt + emitted - 1, size) * request.kv_layers
    own = request.live * blocks_for(emitted - 1, size)
    return (blocks_for(request.prompt, size) + own) * request.kv_layers


def branch_blocks(request: Request, emitted: int, size: int) -> int:
    """Blocks freed when one live branch ends; with the last one goes the prompt."""
    if not request.branch_outputs or request.live == 1:
        return decode_blocks(request, emitted, size)
    return blocks_for(emitted - 1, size) * request.kv_layers
