"""Many simulations of one system file with some values changed, over processes or with Ray."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fxgraft.errors import InputError
from fxgraft.runtime.hermes.config.system import System

Changes = Mapping[str, object]


@dataclass(frozen=True)
class Point:
    """One simulation: what was changed, and its figures."""

    changes: dict[str, object]
    summary: dict[str, Any]


def sweep(
    file: str | Path,
    values: Mapping[str, Sequence[object]],
    *,
    processes: int = 1,
    engine: Literal["processes", "ray"] = "processes",
) -> list[Point]:
    """Simulate all combinations of values.

    The figures of a point depend on its own system only, not on the number of processes.

    Args:
        file: system file.
        values: by path, for example ``{"workloads.0.arrivals.rate": [1, 2, 4]}``.
        processes: to use.
        engine: ``"ray"`` spreads the points over a Ray cluster (needs ray).

    Raises:
        InputError: a path or value is wrong, or ray is not installed.
    """
    points = [dict(zip(values, chosen, strict=True))
              for chosen in itertools.product(*values.values())]  # fmt: skip
    for changes in points:
        System.read(file, changes)
    if engine == "ray":
        return _with_ray(Path(file), points)
    if processes <= 1 or len(points) <= 1:
        return [_simulate(Path(file), changes) for changes in points]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(points)), mp_context=context) as pool:
        return list(pool.map(_simulate, [Path(file)] * len(points), points))


def _simulate(file: Path, changes: dict[str, object]) -> Point:
    return Point(changes, System.read(file, changes).simulate().summary)


def _with_ray(file: Path, points: Sequence[dict[str, object]]) -> list[Point]:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "this sweep needs ray", "pip install 'fxgraft[ray]', or use processes"
        ) from error
    module: Any = ray
    started = not module.is_initialized()
    if started:
        module.init(log_to_driver=False)
    try:
        task = module.remote(_simulate)
        return list(module.get([task.remote(file.resolve(), changes) for changes in points]))
    finally:
        if started:
            module.shutdown()
