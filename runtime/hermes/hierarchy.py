"""Levels of storage for keys and values: expected times, draws, and real contents.

Spec section 6.3. A level is probed only after a miss in all levels before it. A miss in the last
one means that the context is computed again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class StorageLevel:
    """One level.

    Attributes:
        bandwidth: bytes per second.
        latency: of a lookup, in seconds.
        hit: probability that what was missed before is found here, where contents are not known.
        capacity: bytes.
        shared_by: clients that have one instance together.
    """

    bandwidth: float
    latency: float = 0.0
    hit: float = 0.0
    capacity: float = float("inf")
    shared_by: int = 1


def expected_seconds(
    levels: Sequence[StorageLevel], size: float, recompute: float, *, charge_probes: bool = False
) -> float:
    """Expected time to have a context.

    ``f(i) = h·(l + S/w) + (1 - h)·f(i + 1)``, and computing it again after the last level.

    Args:
        levels: in the order of lookup.
        size: of the context in bytes.
        recompute: seconds to compute it again.
        charge_probes: whether a miss costs the level's lookup latency; published: only hits do.
    """
    seconds = recompute
    for level in reversed(levels):
        missed = seconds + (level.latency if charge_probes else 0.0)
        found = level.latency + size / level.bandwidth
        seconds = level.hit * found + (1.0 - level.hit) * missed
    return seconds


def draw_level(levels: Sequence[StorageLevel], random: np.random.Generator) -> int:
    """The level where a lookup ends, by the levels' hit probabilities; their number for a miss."""
    for number, level in enumerate(levels):
        if random.random() < level.hit:
            return number
    return len(levels)


def probe_seconds(
    levels: Sequence[StorageLevel], found: int, *, charge_probes: bool = False
) -> float:
    """Lookup latency of a search that ended at level ``found``."""
    latency = levels[found].latency if found < len(levels) else 0.0
    return latency + (sum(level.latency for level in levels[:found]) if charge_probes else 0.0)


@dataclass(slots=True)
class Store:
    """One instance of a level: least recently used contexts leave when it is full.

    Attributes:
        capacity: bytes.
        used: bytes.
        sizes: by key, least recently used first.
        hits, misses: lookups.
    """

    capacity: float
    used: float = 0.0
    sizes: OrderedDict[int, float] = field(default_factory=OrderedDict[int, float])
    hits: int = 0
    misses: int = 0

    def has(self, key: int, size: float) -> bool:
        """Whether at least ``size`` bytes are there under a key; counts, and marks it as used."""
        found = self.sizes.get(key, 0.0) >= size
        if found:
            self.sizes.move_to_end(key)
            self.hits += 1
        else:
            self.misses += 1
        return found

    def put(self, key: int, size: float) -> None:
        """Keep a context; one that is larger than the store is not kept."""
        self.used -= self.sizes.pop(key, 0.0)
        if size > self.capacity:
            return
        while self.sizes and self.used + size > self.capacity:
            self.used -= self.sizes.popitem(last=False)[1]
        if not self.sizes:
            self.used = 0.0  # what rounding left
        self.sizes[key] = size
        self.used += size
