"""Traces of requests in CSV files, own format and that of the public Azure traces."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fxgraft.errors import InputError

AZURE = {"TIMESTAMP": "arrival", "ContextTokens": "prompt", "GeneratedTokens": "output"}
REQUIRED, OPTIONAL = ("prompt", "output"), ("arrival", "context", "key")


@dataclass(frozen=True)
class TraceRows:
    """The columns of a trace.

    Attributes:
        arrival: seconds, float64 [N]; timestamps count from the first row. Empty if the file has
            none.
        prompt, output: tokens, int64 [N].
        context: tokens of prior context, int64 [N]; zeros if the file has none.
        key: of prior context, int64 [N]; -1 if the file has none.
        has_context: whether the file has a column of prior context.
        sorted_rows: rows that were out of order and moved.
    """

    arrival: npt.NDArray[np.float64]
    prompt: npt.NDArray[np.int64]
    output: npt.NDArray[np.int64]
    context: npt.NDArray[np.int64]
    key: npt.NDArray[np.int64]
    has_context: bool = False
    sorted_rows: int = 0


def read_trace(file: Path, *, arrivals: bool = True, sort: bool = False) -> TraceRows:
    """Read a trace.

    Args:
        file: see ``arrivals.Trace``.
        arrivals: whether arrival times are needed.
        sort: whether rows may be out of order.

    Raises:
        InputError: the file cannot be read, a column is missing, or a row is wrong; names the row.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"trace {file} cannot be read: {error}", "give a CSV file") from error
    if not rows:
        raise InputError(f"trace {file} is empty", "give a header and one row per request")
    names = [AZURE.get(name.strip(), name.strip()) for name in rows[0]]
    needed = (*REQUIRED, "arrival") if arrivals else REQUIRED
    missing = [name for name in needed if name not in names]
    if missing:
        raise InputError(
            f"trace {file} has no column {', '.join(missing)}; its columns are {', '.join(names)}",
            "it needs arrival, prompt, output, or TIMESTAMP, ContextTokens, GeneratedTokens",
        )
    columns = {name: names.index(name) for name in (*REQUIRED, *OPTIONAL) if name in names}
    reader = _Reader(file, columns, is_azure="TIMESTAMP" in rows[0][columns.get("arrival", 0)])
    found = {number: reader.row(number, row) for number, row in enumerate(rows[1:], 2) if row}
    if not found:
        raise InputError(f"trace {file} has no requests", "give one row per request")
    return _assemble(file, found, sort=sort, arrivals=arrivals)


def _assemble(
    file: Path, found: Mapping[int, dict[str, float]], *, sort: bool, arrivals: bool
) -> TraceRows:
    numbers, rows = list(found), list(found.values())

    def column(name: str, default: int) -> npt.NDArray[np.int64]:
        return np.array([row.get(name, default) for row in rows], np.int64)

    times = np.array([row["arrival"] for row in rows] if "arrival" in rows[0] else [])
    late = np.flatnonzero(np.diff(times) < 0) if arrivals else np.array([], np.int64)
    order = np.arange(len(rows))
    if len(late):
        if not sort:
            row = numbers[int(late[0]) + 1]
            raise InputError(
                f"trace {file}, row {row}: its arrival is before that of the row above",
                "sort the file, or write `sort: true` to have it sorted",
            )
        order = np.argsort(times, kind="stable")
    if len(times):
        times = times[order] - min(times.min(), 0.0)
    return TraceRows(
        times,
        column("prompt", 0)[order],
        column("output", 0)[order],
        column("context", 0)[order],
        column("key", -1)[order],
        "context" in rows[0],
        int((order != np.arange(len(rows))).sum()),
    )


class _Reader:
    """Turns rows of text into numbers, or says which row is wrong."""

    def __init__(self, file: Path, columns: dict[str, int], *, is_azure: bool) -> None:
        self._file = file
        self._columns = columns
        self._time: Callable[[str], float] = _seconds
        self._start: np.datetime64 | None = None
        if is_azure:
            self._time = self._timestamp

    def row(self, number: int, row: list[str]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, place in self._columns.items():
            text = row[place].strip() if place < len(row) else ""
            try:
                found[name] = self._time(text) if name == "arrival" else int(text)
            except ValueError:
                self._fail(number, name, text or "empty", "is no number")
        least_time = -math.inf if self._start is not None else 0
        for name, least in (
            ("arrival", least_time), ("prompt", 1), ("output", 1), ("context", 0),
        ):  # fmt: skip
            value = found.get(name, least)
            if not (math.isfinite(value) and value >= least):
                self._fail(number, name, row[self._columns[name]], f"must be {least} or more")
        return found

    def _fail(self, number: int, name: str, text: str, problem: str) -> None:
        raise InputError(
            f"trace {self._file}, row {number}: {name} is {text!r}, it {problem}",
            "correct or remove the row",
        )

    def _timestamp(self, text: str) -> float:
        """Seconds from the first row's timestamp; digits beyond nanoseconds do not matter."""
        if not text:
            raise ValueError
        moment = np.datetime64(text.replace(" ", "T").removesuffix("Z").split("+")[0], "ns")
        if np.isnat(moment):
            raise ValueError
        if self._start is None:
            self._start = moment
        return float((moment - self._start) / np.timedelta64(1, "s"))


def _seconds(text: str) -> float:
    return float(text)
