"""Memory of state: which request holds which blocks and slot, and what can be reused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fxgraft.errors import InputError
from fxgraft.paging import BlockGroup, PagedProgram
from fxgraft.runtime.engine.blocks import GroupBlocks, Page

Active = Sequence[npt.NDArray[np.bool_] | None]


@dataclass(eq=False)
class Holding:
    """What one request holds.

    Attributes:
        pages: per group, the page of each run of ``block_size`` tokens; None where a bounded
            state no longer needs it.
        active: per group, the ops that keep entries for this request, None for all.
        slot: slot of fixed state, 0 if the model has none.
        seed: key of the empty prefix.
        keys: keys of its prefixes, as far as they were computed.
    """

    pages: list[list[Page | None]]
    active: list[npt.NDArray[np.bool_] | None]
    slot: int
    seed: bytes
    keys: list[bytes] = field(default_factory=list[bytes])


@dataclass(frozen=True)
class Added:
    """Pages that a request got: for a group, the first page's number and the blocks."""

    group: int
    start: int
    pages: list[Page]


class StateMemory:
    """Blocks and slots of all requests.

    Args:
        paged: describes the state.
        counts: blocks per group, the first of which belongs to nobody.
        slots: slots that requests may hold, besides slot 0.
        snapshots: slots for copies of fixed state at prefixes.
    """

    def __init__(
        self, paged: PagedProgram, counts: Sequence[int], *, slots: int, snapshots: int
    ) -> None:
        self.block_size = paged.block_size
        self.groups = [
            GroupBlocks(group, count) for group, count in zip(paged.groups, counts, strict=True)
        ]
        self.has_slots = bool(paged.slot_pools)
        self.slots_total = slots if self.has_slots else 0
        self._slots = list(range(slots, 0, -1)) if self.has_slots else []
        first = slots + 1
        self._spare = list(range(first, first + snapshots)) if self.has_slots else []
        self._snapshots: OrderedDict[bytes, int] = OrderedDict()

    @property
    def slots_used(self) -> int:
        """Slots that requests hold."""
        return self.slots_total - len(self._slots)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.block_size)

    def can_open(self, tokens: int, active: Active | None = None) -> bool:
        """Whether a request with this many tokens can be let in, with a page to spare.

        Args:
            tokens: of the request.
            active: per group, the ops that would keep entries for it; None for all.
        """
        pages = self.pages_for(tokens) + 1
        parts = zip(self.groups, active or [None] * len(self.groups), strict=True)
        enough = all(group.can_take(pages, ops) for group, ops in parts)
        return enough and (not self.has_slots or bool(self._slots))

    def open(self, seed: bytes, active: Active | None = None) -> Holding:
        """A holding without pages; takes a slot where the model has fixed state."""
        kept = list(active or [None] * len(self.groups))
        slot = self._slots.pop() if self.has_slots else 0
        return Holding([[] for _ in self.groups], kept, slot, seed)

    def reuse(self, holding: Holding, keys: Sequence[bytes], limit: int) -> tuple[int, int | None]:
        """Take over the longest known prefix of at most ``limit`` tokens.

        Returns:
            The number of tokens whose state was found, and the snapshot of fixed state to copy,
            None if there is none.
        """
        for count in range(min(len(keys), limit // self.block_size), 0, -1):
            key = keys[count - 1]
            if self.has_slots and key not in self._snapshots:
                continue
            if not all(self._covers(group, keys, count) for group in self.groups):
                continue
            for index, group in enumerate(self.groups):
                start = self._first_needed(group.group, count * self.block_size)
                holding.pages[index] = [None] * start + [
                    group.find(keys[number]) for number in range(start, count)
                ]
            holding.keys = list(keys[:count])
            if self.has_slots:
                self._snapshots.move_to_end(key)
            return count * self.block_size, self._snapshots.get(key)
        return 0, None

    def _covers(self, group: GroupBlocks, keys: Sequence[bytes], count: int) -> bool:
        start = self._first_needed(group.group, count * self.block_size)
        return all(group.has(keys[number]) for number in range(start, count))

    def _first_needed(self, group: BlockGroup, past: int) -> int:
        """The first page that a token behind ``past`` others still looks at."""
        return 0 if group.limit is None else max(past - group.limit, 0) // self.block_size

    def can_grow(self, holding: Holding, tokens: int) -> bool:
        """Whether a request can get the pages for this many tokens."""
        wanted = self.pages_for(tokens)
        parts = zip(self.groups, holding.pages, holding.active, strict=True)
        return all(
            group.can_take(wanted - len(pages), active)
            for group, pages, active in parts
            if wanted > len(pages)
        )

    def grow(self, holding: Holding, tokens: int) -> list[Added]:
        """Give a request the pages for this many tokens; call ``can_grow`` first."""
        wanted, added = self.pages_for(tokens), list[Added]()
        for index, (group, pages) in enumerate(zip(self.groups, holding.pages, strict=True)):
            start = len(pages)
            if wanted > start:
                new = [group.take(holding.active[index]) for _ in range(wanted - start)]
                pages.extend(new)
                added.append(Added(index, start, new))
        return added

    def trim(self, holding: Holding, past: int) -> None:
        """Let go of pages that no token behind ``past`` others looks at any more."""
        for group, pages in zip(self.groups, holding.pages, strict=True):
            if group.group.limit is None:
                continue
            for number in range(self._first_needed(group.group, past) - 1, -1, -1):
                page = pages[number]
                if page is None:
                    break
                group.release(page)
                pages[number] = None

    def keep(self, holding: Holding, keys: Sequence[bytes]) -> None:
        """Remember what the first pages hold, one key per page."""
        for group, pages in zip(self.groups, holding.pages, strict=True):
            for page, key in zip(pages, keys, strict=False):
                if page is not None:
                    group.keep(page, key)
        holding.keys = list(keys)

    def snapshot(self, key: bytes) -> int | None:
        """A slot to copy fixed state to, to be found under ``key``; None if it is kept already."""
        if key in self._snapshots:
            self._snapshots.move_to_end(key)
            return None
        if self._spare:
            slot = self._spare.pop()
        elif self._snapshots:
            _, slot = self._snapshots.popitem(last=False)
        else:
            return None
        self._snapshots[key] = slot
        return slot

    def drop_op(self, holding: Holding, group: int, op: int) -> None:
        """Give back what one op keeps for a request."""
        blocks = self.groups[group]
        active = holding.active[group]
        if active is None:
            active = np.ones(blocks.ops, dtype=np.bool_)
        active[op] = False
        holding.active[group] = active
        for page in holding.pages[group]:
            if page is not None:
                blocks.drop_op(page, op)

    def restore_op(self, holding: Holding, group: int, op: int) -> None:
        """Give one op blocks for all that a request has; the opposite of ``drop_op``."""
        active = holding.active[group]
        if active is None or active[op]:
            return
        active[op] = True
        for page in holding.pages[group]:
            if page is not None:
                self.groups[group].restore_op(page, op)

    def close(self, holding: Holding) -> None:
        """Take everything back; prefixes that are kept stay until their memory is needed."""
        for group, pages in zip(self.groups, holding.pages, strict=True):
            # The end of a prefix is of less use than its beginning: it is the first to go.
            for page in reversed(pages):
                if page is not None:
                    group.release(page)
            pages.clear()
        if self.has_slots:
            self._slots.append(holding.slot)

    def forget_prefixes(self) -> None:
        """Drop every kept prefix that nobody uses."""
        for group in self.groups:
            group.forget_idle()
        self._spare += self._snapshots.values()
        self._snapshots.clear()


def block_counts(paged: PagedProgram, memory_bytes: int, max_context: int) -> list[int]:
    """How many blocks each group gets, so that requests run out of all of them together.

    Args:
        paged: describes the state.
        memory_bytes: for all blocks.
        max_context: most tokens of a request.

    Raises:
        InputError: not even one request of ``max_context`` tokens fits.
    """
    usual = min(max_context, 4096)
    needed = [_pages(paged, group, usual) * len(group.layers) for group in paged.groups]
    request_bytes = sum(
        count * group.block_bytes for count, group in zip(needed, paged.groups, strict=True)
    )
    counts = [int(memory_bytes / max(request_bytes, 1) * count) for count in needed]
    for group, count in zip(paged.groups, counts, strict=True):
        least = (_pages(paged, group, max_context) + 1) * len(group.layers) + 1
        if count < least:
            per_token = sum(g.block_bytes * len(g.layers) for g in paged.groups) / paged.block_size
            raise InputError(
                f"engine option memory_bytes={memory_bytes} is too little for one request of "
                f"max_context={max_context} tokens ({per_token:.0f} bytes per token)",
                "give more memory, or set a smaller max_context",
            )
    return counts


def _pages(paged: PagedProgram, group: BlockGroup, tokens: int) -> int:
    return -(-tokens // paged.block_size) + 1
