"""Rows of numbers that grow: packed as they come, kept as compact columns."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_CHUNK = 1 << 14


class Rows:
    """A growing table of float64.

    Args:
        columns: their names.
        keep: whether rows are kept; dropped rows still reach ``reduce``.
        reduce: called with each chunk, float64 [rows, columns], before it is kept or dropped.

    Attributes:
        append: adds one row, a tuple with a number for each column.
        wanted: whether anybody sees the rows.
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
        self.reduce = reduce
        self.wanted = keep or reduce is not None
        self._pending = bytearray()
        self._chunks: list[Array] = []
        self.append = self._appender() if self.wanted else _drop

    def _appender(self) -> Callable[[tuple[float, ...]], None]:
        """A closure, because it is called several times per simulated request."""
        extend, pending, flush = self._pending.extend, self._pending, self.flush
        pack = struct.Struct(f"{len(self.columns)}d").pack
        limit = _CHUNK * 8 * len(self.columns)

        def append(row: tuple[float, ...]) -> None:
            extend(pack(*row))
            if len(pending) >= limit:
                flush()

        return append

    def flush(self) -> None:
        """Turn pending rows into an array."""
        if not self._pending:
            return
        chunk = np.frombuffer(bytes(self._pending), dtype=np.float64)
        chunk = chunk.reshape(-1, len(self.columns))
        self._pending.clear()
        if self.reduce is not None:
            self.reduce(chunk)
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


def _drop(row: tuple[float, ...]) -> None:
    """Rows that nobody wants."""
