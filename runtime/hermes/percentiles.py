"""Percentiles by nearest rank: the smallest value that at least that share does not exceed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fxgraft.runtime.hermes.log import Array

PERCENTS = (50, 90, 95, 99)
_DROPPED_BITS = 44


def nearest_rank(values: Array, percent: float) -> float:
    """The value at rank ``ceil(percent / 100 · N)``; NaN of nothing."""
    return nearest_ranks(values, (percent,))[0]


def nearest_ranks(values: Array, percents: Sequence[float] = PERCENTS) -> list[float]:
    """The same for several percentages."""
    count = len(values)
    if count == 0:
        return [math.nan] * len(percents)
    places = [_rank(percent, count) - 1 for percent in percents]
    return np.partition(values, places)[places].tolist()


def weighted_nearest_ranks(
    values: Array, weights: Array, percents: Sequence[float] = PERCENTS
) -> list[float]:
    """The same for values that are not negative and stand for ``weights`` equal ones each."""
    if len(values) == 0:
        return [math.nan] * len(percents)
    # Values of nearly the same size share a bin, by the leading bits of the number; only the bins
    # that hold a rank are sorted.
    leading = np.ascontiguousarray(values).view(np.int64) >> _DROPPED_BITS
    leading -= leading.min()
    reached = np.cumsum(np.bincount(leading, weights))
    found: list[float] = []
    for percent in percents:
        rank = _rank(percent, reached[-1]) - 0.5
        place = int(np.searchsorted(reached, rank))
        inside = leading == place
        before = reached[place - 1] if place else 0.0
        near, heavy = values[inside], weights[inside]
        order = np.argsort(near)
        within = np.searchsorted(np.cumsum(heavy[order]), rank - before)
        found.append(float(near[order[within]]))
    return found


def _rank(percent: float, count: float) -> int:
    return max(math.ceil(percent * count / 100 - 1e-9), 1)


def describe(values: Array) -> dict[str, float]:
    """Count, mean and percentiles; infinite values, of requests that were cut off, count."""
    found = {"count": float(len(values)), "mean": float(values.mean()) if len(values) else math.nan}
    ranks = zip(PERCENTS, nearest_ranks(values), strict=True)
    return found | {f"p{percent}": value for percent, value in ranks}
