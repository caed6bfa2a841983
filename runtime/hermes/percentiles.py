"""Percentiles by nearest rank: the smallest value that at least that share does not exceed."""

from __future__ import annotations

import math

import numpy as np

from fxgraft.runtime.hermes.log import Array

PERCENTS = (50, 90, 95, 99)


def nearest_rank(values: Array, percent: float) -> float:
    """The value at rank ``ceil(percent / 100 · N)``; NaN of nothing."""
    count = len(values)
    if count == 0:
        return math.nan
    rank = max(math.ceil(percent * count / 100 - 1e-9), 1)
    return float(np.partition(values, rank - 1)[rank - 1])


def weighted_nearest_rank(values: Array, weights: Array, percent: float) -> float:
    """The same for values that stand for ``weights`` equal ones each."""
    if len(values) == 0:
        return math.nan
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    rank = max(math.ceil(percent * reached[-1] / 100 - 1e-9), 1)
    return float(values[order][np.searchsorted(reached, rank - 0.5)])


def describe(values: Array) -> dict[str, float]:
    """Count, mean and percentiles; infinite values, of requests that were cut off, count."""
    found = {"count": float(len(values)), "mean": float(values.mean()) if len(values) else math.nan}
    return found | {f"p{percent}": nearest_rank(values, percent) for percent in PERCENTS}
