"""Gaps between tokens, from the logs of steps: exact, or in bins of one part in a thousand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fxgraft.runtime.hermes.client import GAP_COLUMNS, STEP_COLUMNS
from fxgraft.runtime.hermes.log import Array
from fxgraft.runtime.hermes.percentiles import PERCENTS, weighted_nearest_ranks

_BINS_PER_E = 1000
_LOWEST = 1e-9
_CHUNK = 1 << 16


def gap_values(steps: Mapping[str, Array], gaps: Mapping[str, Array]) -> tuple[Array, Array]:
    """All gaps between consecutive tokens of a sequence.

    Args:
        steps: rows of ``STEP_COLUMNS``.
        gaps: rows of ``GAP_COLUMNS``.

    Returns:
        Seconds and the number of queries that had each, float64 [N].
    """
    values, weights = _step_gaps(steps)
    return (
        np.concatenate([values, gaps["seconds"]]),
        np.concatenate([weights, gaps["queries"]]),
    )


def _step_gaps(steps: Mapping[str, Array]) -> tuple[Array, Array]:
    """The first step of a row has the row's gap, the ones after it last as long as their step."""
    with_older = steps["older"] > 0
    more = np.where(steps["decodes"] > 0, np.maximum(steps["steps"] - 1, 0), 0).astype(np.int64)
    rows = np.repeat(np.arange(len(more)), more)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(more) - more, more) + 1
    later = steps["first_seconds"][rows] + steps["slope"][rows] * number
    return (
        np.concatenate([steps["gap"][with_older], later]),
        np.concatenate([steps["older"][with_older], steps["decodes"][rows]]),
    )


class GapHistogram:
    """Gaps in logarithmic bins, for runs whose steps are not kept."""

    def __init__(self) -> None:
        size = int(np.log(1e9 / _LOWEST) * _BINS_PER_E) + 1
        self.counts = np.zeros(size)
        self.total = 0.0

    @staticmethod
    def of(steps: Mapping[str, Array], gaps: Mapping[str, Array]) -> GapHistogram:
        """The gaps of logs that were kept, chunk by chunk."""
        found = GapHistogram()
        for table, add in ((steps, found.add_steps), (gaps, found.add_gaps)):
            rows = len(next(iter(table.values())))
            for start in range(0, rows, _CHUNK):
                add(np.stack([column[start : start + _CHUNK] for column in table.values()], axis=1))
        return found

    def add_steps(self, chunk: Array) -> None:
        """Rows of ``STEP_COLUMNS``."""
        self._add(*_step_gaps({name: chunk[:, i] for i, name in enumerate(STEP_COLUMNS)}))

    def add_gaps(self, chunk: Array) -> None:
        """Rows of ``GAP_COLUMNS``."""
        columns = {name: chunk[:, i] for i, name in enumerate(GAP_COLUMNS)}
        self._add(columns["seconds"], columns["queries"])

    def _add(self, values: Array, weights: Array) -> None:
        places = np.log(np.maximum(values, _LOWEST) / _LOWEST) * _BINS_PER_E
        clipped = np.minimum(places.astype(np.int64), len(self.counts) - 1)
        self.counts += np.bincount(clipped, weights, len(self.counts))
        self.total += float(values @ weights)

    def values(self) -> tuple[Array, Array]:
        """Middles of the bins that are not empty, and how many gaps they hold."""
        filled = np.flatnonzero(self.counts)
        return _LOWEST * np.exp((filled + 0.5) / _BINS_PER_E), self.counts[filled]

    def describe(self) -> dict[str, float]:
        """Count, exact mean, and percentiles to one part in a thousand."""
        values, weights = self.values()
        count = float(weights.sum())
        return describe_gaps(values, weights, self.total / count if count else float("nan"))


def describe_gaps(values: Array, weights: Array, mean: float | None = None) -> dict[str, float]:
    """Count, mean and percentiles of gaps."""
    count = float(weights.sum())
    if mean is None:
        mean = float(values @ weights / count) if count else float("nan")
    ranks = zip(PERCENTS, weighted_nearest_ranks(values, weights), strict=True)
    return {"count": count, "mean": mean} | {f"p{percent}": value for percent, value in ranks}
