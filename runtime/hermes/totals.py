"""Sums over the steps of each client, from the log as it grows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fxgraft.runtime.hermes.client import STEP_COLUMNS
from fxgraft.runtime.hermes.log import Array

_CLIENT, _START, _END, _STEPS, _JOULES = (
    STEP_COLUMNS.index(name) for name in ("client", "start", "end", "steps", "joules")
)


class StepTotals:
    """Adds up steps, seconds and joules.

    Args:
        clients: their number.
        following: gets each chunk afterwards.

    Attributes:
        sums: steps, seconds and joules of each client, float64 [clients, 3].
    """

    def __init__(self, clients: int, following: Callable[[Array], None] | None) -> None:
        self.sums = np.zeros((clients, 3))
        self._following = following

    def add(self, chunk: Array) -> None:
        """Rows of ``STEP_COLUMNS``."""
        client = chunk[:, _CLIENT].astype(np.int64)
        values = chunk[:, _STEPS], chunk[:, _END] - chunk[:, _START], chunk[:, _JOULES]
        for column, weights in enumerate(values):
            self.sums[:, column] += np.bincount(client, weights, len(self.sums))
        if self._following is not None:
            self._following(chunk)
