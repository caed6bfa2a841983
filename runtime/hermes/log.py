"""Rows of numbers that grow: appended as tuples, kept as compact columns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_CHUNK = 1 << 15


class Rows:
    """A growing table of floats.

    Args:
        columns: their names.
        keep: whether rows are kept; dropped rows still reach ``reduce``.
        reduce: called with each chunk, float64 [rows, columns], before it is kept or dropped.
    """

    def __init__(
        self,
        columns: tuple[str, ...],
        *,
        keep: bool = True,
        reduce: Callable[[Array], None] | None = None,
    ) -> None:
        self.columns = columns
        self.keep = keep
        self.wanted = keep or reduce is not None
        self._reduce = reduce
        self._pending: list[tuple[float, ...]] = []
        self._chunks: list[Array] = []

    def append(self, row: tuple[float, ...]) -> None:
        """Add one row."""
        pending = self._pending
        pending.append(row)
        if len(pending) >= _CHUNK:
            self.flush()

    def flush(self) -> None:
        """Turn pending tuples into an array."""
        if not self._pending:
            return
        chunk = np.array(self._pending, dtype=np.float64)
        self._pending.clear()
        if self._reduce is not None:
            self._reduce(chunk)
        if self.keep:
            self._chunks.append(chunk)

    def table(self) -> dict[str, Array]:
        """The kept rows by column, float64 [rows] each."""
        self.flush()
        if not self._chunks:
            return {name: np.empty(0) for name in self.columns}
        if len(self._chunks) > 1:
            self._chunks = [np.concatenate(self._chunks)]
        return {name: self._chunks[0][:, i] for i, name in enumerate(self.columns)}
