"""Blocks of KV memory, and the prefix cache in them (spec section 8)."""

from __future__ import annotations

from collections import OrderedDict

from fxgraft.runtime.hermes.request import Request

_UNIQUE = 1 << 62


def blocks_for(tokens: int, size: int) -> int:
    """Blocks that so many tokens fill."""
    return -(-tokens // size)


class BlockPool:
    """Counts blocks in use; with a prefix cache it also knows what free blocks still hold.

    Attributes:
        capacity: all blocks.
        size: tokens per block.
        used: blocks that belong to running requests; shared ones count once.
        peak: most blocks that were in use.
    """

    def __init__(self, capacity: int, size: int, *, prefix_cache: bool = False) -> None:
        self.capacity = capacity
        self.size = size
        self.used = 0
        self.peak = 0
        self.prefix_cache = prefix_cache
        self.hit_tokens = 0
        self.asked_tokens = 0
        # By hash of a chain of blocks: how many requests use it.
        self._users: dict[int, int] = {}
        # Blocks nobody uses, least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Blocks that can be had now; cached ones that nobody uses count as free."""
        return self.capacity - self.used

    def take(self, blocks: int) -> None:
        """Allocate blocks; the caller has seen that they are free."""
        self.used += blocks
        if self.used > self.peak:
            self.peak = self.used
        if self._idle:
            self._evict()

    def give(self, blocks: int) -> None:
        """Free blocks."""
        self.used -= blocks

    def _evict(self) -> None:
        while self._idle and self.used + len(self._idle) > self.capacity:
            self._idle.popitem(last=False)

    def match(self, request: Request, wanted: int) -> list[int]:
        """Hashes of the leading blocks of a request that are cached; at most ``wanted``."""
        found: list[int] = []
        for block in chain(request, self.size)[:wanted]:
            if block not in self._users and block not in self._idle:
                break
            found.append(block)
        return found

    def share(self, hashes: list[int]) -> int:
        """Use cached blocks; returns how many of them nobody used before."""
        fresh = 0
        for block in hashes:
            users = self._users.get(block, 0)
            self._users[block] = users + 1
            if users == 0:
                del self._idle[block]
                fresh += 1
        return fresh

    def idle_among(self, hashes: list[int]) -> int:
        """How many of these cached blocks nobody uses: using them takes free blocks."""
        return sum(block in self._idle for block in hashes)

    def publish(self, request: Request, tokens: int) -> int:
        """A request's first ``tokens`` tokens are computed: others may share their full blocks.

        Returns:
            Blocks that turned out to be there already; its own copies of them are freed.
        """
        hashes = chain(request, self.size)[: tokens // self.size]
        known, double = len(request.shared), 0
        for block in hashes[known:]:
            users = self._users.get(block, 0)
            if users == 0 and block in self._idle:
                del self._idle[block]
            elif users:
                double += 1
            self._users[block] = users + 1
        request.shared = tuple(hashes) if len(hashes) > known else request.shared
        return double

    def unshare(self, hashes: tuple[int, ...]) -> int:
        """A request leaves: its shared blocks stay cached where nobody else uses them.

        Returns:
            How many of its blocks are still in use by others.
        """
        in_use = 0
        for block in reversed(hashes):
            users = self._users[block] - 1
            if users:
                self._users[block] = users
                in_use += 1
            else:
                del self._users[block]
                self._idle[block] = None
        return in_use


def chain(request: Request, size: int) -> list[int]:
    """Hashes of a request's full blocks with known content, each with all before it.

    Content is known for the parts of ``request.prefix``; the rest of the prompt and what was
    emitted belongs to the request alone, and is found again by its own later stages.
    """
    tokens = request.prompt
    if not request.branch_outputs:
        tokens += max(request.emitted - 1, 0)
    known = request.hashes
    if known is None or known[:2] != (tokens, size):
        request.hashes = known = tokens, size, _chain(request, tokens, size)
    return known[2]


def _chain(request: Request, tokens: int, size: int) -> list[int]:
    parts = [*request.prefix, (_UNIQUE + request.index, tokens + 1)]
    hashes: list[int] = []
    parent, part, left = 0, 0, parts[0][1]
    for _ in range(tokens // size):
        content: list[tuple[int, int]] = []
        wanted = size
        while wanted:
            taken = min(wanted, left)
            if taken:
                content.append((parts[part][0], taken))
            wanted, left = wanted - taken, left - taken
            if left == 0:
                part += 1
                left = parts[part][1]
        parent = hash((parent, *content))
        hashes.append(parent)
    return hashes
