"""Blocks of one group: who has them, and which hold prefixes worth keeping."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxgraft.paging import BlockGroup

Ids = npt.NDArray[np.int32]


@dataclass(eq=False)
class Page:
    """The blocks that hold the same run of tokens for every op of a group.

    Attributes:
        blocks: int32, one per op; 0 where an op keeps nothing.
        references: requests that use it.
        key: under which it is kept for reuse, None if it is not.
    """

    blocks: Ids
    references: int = 1
    key: bytes | None = None


class GroupBlocks:
    """Allocation of one group's blocks.

    A page that nobody uses any more stays as long as its memory is not needed, if its content
    may be of use again; the one that was left alone longest goes first.

    Args:
        group: the group.
        count: blocks in its pools, the first of which belongs to nobody.
    """

    def __init__(self, group: BlockGroup, count: int) -> None:
        self.group = group
        self.total = count - 1
        self._free: Ids = np.arange(count - 1, 0, -1, dtype=np.int32)
        self._top = count - 1
        self._kept: dict[bytes, Page] = {}
        self._idle: OrderedDict[bytes, Page] = OrderedDict()

    @property
    def ops(self) -> int:
        """Blocks of a whole page."""
        return len(self.group.layers)

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return self._top

    @property
    def idle(self) -> int:
        """Blocks that hold prefixes which nobody uses now."""
        return len(self._idle) * self.ops

    def can_take(self, pages: int, active: npt.NDArray[np.bool_] | None = None) -> bool:
        """Whether this many pages can be had, with blocks for the active ops (all if None)."""
        ops = self.ops if active is None else int(np.count_nonzero(active))
        return pages * ops <= self.free + self.idle

    def take(self, active: npt.NDArray[np.bool_] | None = None) -> Page:
        """A new page; ``active`` tells for which ops, all if None. Call ``can_take`` first."""
        wanted = self.ops if active is None else int(np.count_nonzero(active))
        while self._top < wanted:
            _, page = self._idle.popitem(last=False)
            self._forget(page)
        self._top -= wanted
        ids = self._free[self._top : self._top + wanted].copy()
        if active is None:
            return Page(ids)
        blocks = np.zeros(self.ops, dtype=np.int32)
        blocks[active] = ids
        return Page(blocks)

    def find(self, key: bytes) -> Page | None:
        """The page kept under a key, for the caller to use; None if there is none."""
        page = self._kept.get(key)
        if page is not None:
            self._idle.pop(key, None)
            page.references += 1
        return page

    def has(self, key: bytes) -> bool:
        """Whether a page is kept under a key."""
        return key in self._kept

    def keep(self, page: Page, key: bytes) -> None:
        """Remember what a page holds."""
        if page.key is None and key not in self._kept and page.blocks.all():
            page.key = key
            self._kept[key] = page

    def release(self, page: Page) -> None:
        """One user less."""
        page.references -= 1
        if page.references:
            return
        if page.key is not None:
            self._idle[page.key] = page
        else:
            self._give(page.blocks)

    def drop_op(self, page: Page, op: int) -> None:
        """Give back one op's block of a page that a single request uses."""
        if page.references > 1:
            return
        if page.key is not None:
            del self._kept[page.key]
            page.key = None
        self._give(page.blocks[op : op + 1])
        page.blocks[op] = 0

    def restore_op(self, page: Page, op: int) -> None:
        """Give one op a block of a page again."""
        if page.blocks[op] == 0:
            wanted = np.zeros(self.ops, dtype=np.bool_)
            wanted[op] = True
            page.blocks[op] = self.take(wanted).blocks[op]

    def forget_idle(self) -> None:
        """Drop every kept page that nobody uses."""
        while self._idle:
            self._forget(self._idle.popitem(last=False)[1])

    def _forget(self, page: Page) -> None:
        assert page.key is not None
        del self._kept[page.key]
        page.key = None
        self._give(page.blocks)

    def _give(self, blocks: Ids) -> None:
        given = blocks[blocks > 0]
        self._free[self._top : self._top + len(given)] = given
        self._top += len(given)
