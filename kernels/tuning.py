"""Configurations that were chosen by measurement, kept on disk.

A table is one JSON file per op under ``$FXGRAFT_CACHE`` (default: ``fxgraft`` in the user's cache
folder). Under it lie the configurations that come with the package. Looking up never measures;
``measure`` is for the functions that fill a table.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, Generic, TypeVar, cast

import torch

from fxgraft.errors import SerializationError

Config = TypeVar("Config")
_VERSION = 1
_WARM_SECONDS = 0.03


@dataclass(frozen=True)
class Key:
    """What a configuration was measured for.

    Attributes:
        device: name of the GPU.
        dtype: for example ``"torch.bfloat16"``.
        sizes: sizes that the op chooses by.
    """

    device: str
    dtype: str
    sizes: tuple[int, ...]

    def text(self) -> str:
        """The key of the entry in the file."""
        return f"{self.device}|{self.dtype}|{'x'.join(map(str, self.sizes))}"


def cache_folder() -> Path:
    """Where tuned tables are kept."""
    given = os.environ.get("FXGRAFT_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fxgraft"


class TunedTable(Generic[Config]):
    """Tuned configurations of one op: a dataclass instance for each key.

    Args:
        op: name of the op, and of the file.
        kind: the dataclass of configurations, with fields of plain JSON types.
        shipped: a table in the package, which counts where the user's has no entry.
    """

    def __init__(self, op: str, kind: Callable[..., Config], shipped: Path | None = None) -> None:
        self.op = op
        self.kind = kind
        self.shipped = shipped
        self._entries: dict[str, Config] | None = None

    @property
    def path(self) -> Path:
        """The table's file."""
        return cache_folder() / f"{self.op}.json"

    def get(self, key: Key) -> Config | None:
        """The configuration for a key, or None if nobody has measured it.

        Raises:
            SerializationError: a file is not a table that this version wrote.
        """
        if self._entries is None:
            shipped = {} if self.shipped is None else self._read(self.shipped)
            self._entries = shipped | self._read(self.path)
        return self._entries.get(key.text())

    def put(self, entries: dict[Key, Config]) -> None:
        """Add or replace configurations, in memory and in the file.

        Raises:
            SerializationError: the file is not a table that this version wrote.
        """
        merged = self._read(self.path) | {key.text(): config for key, config in entries.items()}
        self._entries = None
        document = {
            "version": _VERSION,
            "entries": {key: asdict(cast(Any, merged[key])) for key in sorted(merged)},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            written = Path(folder) / self.path.name
            with written.open("w", encoding="utf-8") as file:
                json.dump(document, file, indent=1)
            written.replace(self.path)

    def _read(self, path: Path) -> dict[str, Config]:
        if not path.is_file():
            return {}
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if set(document) != {"version", "entries"} or document["version"] != _VERSION:
                raise ValueError("it is not a table of this version")
            return {key: self._config(value) for key, value in document["entries"].items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise SerializationError(
                f"the table of tuned kernels {path} cannot be read: {error}",
                "delete the file; it is measured again",
            ) from error

    def _config(self, value: dict[str, object]) -> Config:
        names = {field.name for field in fields(cast(Any, self.kind))}
        if set(value) != names:
            raise ValueError(f"an entry has the fields {', '.join(sorted(value))}")
        return self.kind(**value)


@contextmanager
def _captured(calls: Sequence[Callable[[], object]]) -> Generator[torch.cuda.CUDAGraph]:
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    yield graph
    del kept


def measure(calls: Sequence[Callable[[], object]], replays: int = 5) -> float:
    """Seconds per call, of calls captured one after the other in one CUDA graph.

    Args:
        calls: launch the same kernel on different memory, more in all than the L2 cache holds.
        replays: the median of so many is taken, after the device has worked for a while: its clock
            and its tables of memory pages take some milliseconds.
    """
    with _captured(calls) as graph:
        warm = 0.0
        while warm < _WARM_SECONDS:
            warm += _replay_seconds(graph)
        times = [_replay_seconds(graph) for _ in range(replays)]
    return median(times) / len(calls)


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
