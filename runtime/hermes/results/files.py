"""Logs as CSV or Parquet files."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from fxgraft.errors import InputError
from fxgraft.runtime.hermes.log import Array
from fxgraft.runtime.hermes.request import TERMINAL
from fxgraft.runtime.hermes.stages import KINDS

_NAMES = {"state": TERMINAL, "kind": KINDS}
_TIMES = frozenset({
    "arrival", "end", "start", "assigned", "started", "ended", "first_token", "decode_seconds",
    "max_gap", "queue_seconds", "transfer_seconds", "first_seconds", "slope", "joules", "gap",
    "seconds", "stopped", "resumed", "bytes",
})  # fmt: skip
"""Columns that are not whole numbers."""


def columns(table: Mapping[str, Array]) -> dict[str, Any]:
    """A log with whole numbers as such, and states and kinds by name."""
    found: dict[str, Any] = {}
    for name, values in table.items():
        if name in _NAMES:
            found[name] = np.array(_NAMES[name])[values.astype(np.int64)]
        else:
            found[name] = values if name in _TIMES else values.astype(np.int64)
    return found


def write_table(path: Path, table: Mapping[str, Array], *, parquet: bool) -> Path:
    """Write a log to ``path`` with the ending ``.csv`` or ``.parquet``.

    Raises:
        InputError: pyarrow is not installed.
    """
    if parquet:
        return _write_parquet(path.with_suffix(".parquet"), columns(table))
    path = path.with_suffix(".csv")
    found = [values.tolist() for values in columns(table).values()]
    with path.open("w", encoding="utf-8") as stream:
        stream.write(",".join(table) + "\n")
        stream.writelines(
            ",".join([v if isinstance(v, str) else repr(v) for v in row]) + "\n"
            for row in zip(*found, strict=True)
        )
    return path


def _write_parquet(path: Path, found: Mapping[str, Any]) -> Path:
    try:
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise InputError(
            "Parquet files need pyarrow", "pip install 'fxgraft[parquet]', or write CSV"
        ) from error
    parquet.write_table(arrow.table(dict(found)), path)
    return path


def plain(value: Any) -> Any:
    """A value for JSON: numbers that JSON lacks become None, or the text ``"infinite"``."""
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, Any]", value)
        return {str(key): plain(entry) for key, entry in entries.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in cast("list[Any]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "infinite"
    return value
