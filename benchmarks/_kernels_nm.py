"""N:M sparse linear layers on a GPU: timing, and choosing configurations."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxgraft.errors import Error
from fxgraft.kernels.launch import power_of_2
from fxgraft.kernels.nm_linear import sparse_cores
from fxgraft.kernels.nm_linear.config import (
    FEW_ROWS as MOST_FEW_ROWS,
)
from fxgraft.kernels.nm_linear.config import (
    TABLE,
    Config,
    config_for,
    describe,
    has_tiles,
    key_of,
    rule,
)
from fxgraft.kernels.nm_linear.layout import Layout, layout_of_columns
from fxgraft.kernels.nm_linear.packing import pack, unpack
from fxgraft.kernels.tuning import measure

DTYPE = torch.bfloat16
PATTERNS = ((2, 4), (4, 8), (2, 8), (1, 4), (8, 16))
# K × N: single and merged layers of Llama-2-7B, then those of Llama-3-8B.
SHAPES = (
    (4096, 4096), (4096, 12288), (4096, 22016), (11008, 4096),
    (4096, 6144), (4096, 28672), (14336, 4096),
)  # fmt: skip
FEW_ROWS = (1, 2, 4, 8)
MANY_ROWS = (16, 64, 256, 1024, 4096)
# Row tiles, warps, splits, iterations loaded ahead of the kernel "mma".
_FRAGMENTS = (
    (1, 4, 1, 1), (1, 8, 1, 1), (1, 8, 1, 0), (2, 4, 1, 1), (2, 8, 1, 1), (1, 4, 2, 1),
    (1, 4, 1, 0),
)  # fmt: skip
_DISTINCT_BYTES = 256e6
_LEAST_SECONDS = 1e-3
Packed = tuple[Tensor, Tensor]


def random_mask(features: int, inner: int, n: int, m: int) -> Tensor:
    """Bool [features, inner] on the GPU, n random columns of every group of m."""
    scores = torch.rand(features, inner // m, m, device="cuda")
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(-1, scores.topk(n, -1).indices, value=True).view(features, inner)


def random_indices(features: int, layout: Layout) -> Tensor:
    """Indices of a weight, its integers drawn from those of 1,024 packed rows of one chunk."""
    columns = layout.lane * layout.m
    zeros = torch.zeros(1024, columns, dtype=DTYPE, device="cuda")
    mask = random_mask(1024, columns, layout.n, layout.m)
    pool = pack(zeros, mask, layout.n, layout.m)[1].flatten()
    shape = layout.indices_shape(features)
    return pool[torch.randint(len(pool), shape, device="cuda")]


@dataclass(frozen=True)
class Layer:
    """Packed weights [N, K] of one shape and pattern, as many as no cache holds."""

    inner: int
    features: int
    layout: Layout
    weights: list[Packed]

    @classmethod
    def make(cls, inner: int, features: int, pattern: tuple[int, int]) -> Layer:
        """Random weights, a pool of whose codes is packed and drawn from."""
        layout = layout_of_columns(inner, *pattern)
        values = torch.randn(layout.values_shape(features), dtype=DTYPE, device="cuda")
        first = (values.mul_(inner**-0.5), random_indices(features, layout))
        count = max(2, int(-(-_DISTINCT_BYTES // sum(part.nbytes for part in first))))
        copies = [(first[0].clone(), first[1].clone()) for _ in range(count)]
        return cls(inner, features, layout, copies)

    def bytes(self, rows: int) -> int:
        """Bytes of one call: packed weights, inputs and outputs once."""
        packed = sum(part.nbytes for part in self.weights[0])
        return packed + rows * (self.inner + self.features) * DTYPE.itemsize

    def seconds(self, function: Callable[[Tensor, Packed], Tensor], rows: int) -> float:
        """Time of one call in a CUDA graph of calls on one weight after the other."""
        x = torch.randn(rows, self.inner, dtype=DTYPE, device="cuda")
        calls = max(len(self.weights), int(_LEAST_SECONDS * 3e12 / self.bytes(rows)))
        rotated = [self.weights[i % len(self.weights)] for i in range(calls)]
        return measure([partial(function, x, weight) for weight in rotated])

    def error(self, function: Callable[[Tensor, Packed], Tensor], rows: int) -> float:
        """Relative error against float64."""
        x = torch.randn(rows, self.inner, dtype=DTYPE, device="cuda")
        values, indices = self.weights[0]
        dense = unpack(values, indices, self.layout.n, self.layout.m).double()
        expected = linear(x.double(), dense)
        found = function(x, self.weights[0]).double()
        return float((found - expected).norm() / expected.norm())

    def ours(self, x: Tensor, weight: Packed) -> Tensor:
        """The op, as a graph calls it."""
        operator = cast(Any, torch.ops.fxgraft).nm_linear
        return operator(x, *weight, n=self.layout.n, m=self.layout.m)

    def with_config(self, config: Config) -> Callable[[Tensor, Packed], Tensor]:
        """The op with a given configuration."""
        from fxgraft.kernels.nm_linear import triton

        def run(x: Tensor, weight: Packed) -> Tensor:
            if config.kernel == "sparse":
                return sparse_cores.linear(x, *weight, None, (self.layout.n, self.layout.m))
            if config.kernel == "unpack":
                return linear(x, triton.unpack(*weight, self.layout))
            return triton.nm_linear(x, *weight, layout=self.layout, config=config)

        return run


def dense_seconds(inner: int, features: int, rows: int) -> float:
    """Time of cuBLAS on dense weights, rotated likewise."""
    size = inner * features * DTYPE.itemsize
    count = max(2, int(-(-_DISTINCT_BYTES // size)))
    weights = [torch.randn(features, inner, dtype=DTYPE, device="cuda") for _ in range(count)]
    x = torch.randn(rows, inner, dtype=DTYPE, device="cuda")
    calls = max(count, int(_LEAST_SECONDS * 3e12 / size))
    return measure([partial(linear, x, weights[i % count]) for i in range(calls)])


def sparse_seconds(layer: Layer, rows: int) -> float | None:
    """Time of cuSPARSELt on a 2:4 layer, or None where PyTorch cannot call it."""
    if (layer.layout.n, layer.layout.m) != (2, 4):
        return None
    try:
        return layer.seconds(layer.with_config(Config("sparse")), rows)
    except (RuntimeError, Error) as error:
        print(f"cuSPARSELt, {rows} rows: {error}", flush=True)
        return None


def candidates(layout: Layout, rows: int) -> list[Config]:
    """A short list of what may be best for a number of rows."""
    found = [rule(DTYPE, 4096, layout, rows), Config("unpack")]
    if rows <= MOST_FEW_ROWS:
        return [
            Config("mma", 16 * tiles, 4 * warps, split, warps, prefetch=ahead)
            for tiles, warps, split, ahead in _FRAGMENTS
            if 4 * warps * split <= layout.chunks and layout.n * tiles <= 8
        ]
    if (layout.n, layout.m) == (2, 4):
        found.append(Config("sparse"))
    if has_tiles(DTYPE, layout) and rows <= 256:
        widest = min(128, max(16, power_of_2(rows)))
        splits = (1, 2, 4) if rows <= 64 else (1,)
        found += [
            Config("matrix", n, c, split, warps, widest)
            for (n, c, warps), split in product(((32, 4, 4), (64, 2, 4), (64, 4, 8)), splits)
        ]
    return list(dict.fromkeys(found))


def prepare(jobs: Iterable[tuple[tuple[int, int], int, int, Config]]) -> None:
    """Compile configurations for (pattern, inner, rows), in processes of their own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), context) as pool:
        for problem in pool.map(_compile, jobs, chunksize=2):
            if problem:
                print(problem, flush=True)


def chosen(rows: Iterable[int]) -> list[tuple[tuple[int, int], int, int, Config]]:
    """What the op runs on ``SHAPES``, once for each kernel that is compiled."""
    found = {}
    for (inner, features), pattern, count in product(SHAPES, PATTERNS, rows):
        layout = layout_of_columns(inner, *pattern)
        config = config_for(torch.device("cuda"), DTYPE, features, layout, count)
        found[_compiled_as(pattern, inner, count, config)] = (pattern, inner, count, config)
    return list(found.values())


def _compiled_as(
    pattern: tuple[int, int], inner: int, rows: int, config: Config
) -> tuple[object, ...]:
    is_vector = config.kernel == "vector"
    return (pattern, config, (inner, rows) if is_vector else None)


def _compile(job: tuple[tuple[int, int], int, int, Config]) -> str | None:
    pattern, inner, rows, config = job
    if config.kernel == "sparse":
        return None
    try:
        layout = layout_of_columns(inner, *pattern)
        features = 512
        weight = (
            torch.zeros(layout.values_shape(features), dtype=DTYPE, device="cuda"),
            torch.zeros(layout.indices_shape(features), dtype=layout.word_dtype, device="cuda"),
        )
        layer = Layer(inner, features, layout, [weight])
        layer.with_config(config)(torch.zeros(rows, inner, dtype=DTYPE, device="cuda"), weight)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{pattern} {describe(config)}: {error!r}"[:300]
    return None


def tune(shapes: Iterable[tuple[int, int]], rows: Iterable[int]) -> Iterator[str]:
    """Measure all candidates and put the best into the user's table; yields lines to print."""
    shapes, rows = list(shapes), list(rows)
    jobs = {}
    for pattern, count in product(PATTERNS, rows):
        for config in candidates(layout_of_columns(4096, *pattern), count):
            jobs[_compiled_as(pattern, 4096, count, config)] = (pattern, 4096, count, config)
    prepare(jobs.values())
    for (inner, features), pattern in product(shapes, PATTERNS):
        layer = Layer.make(inner, features, pattern)
        for count in rows:
            times = _times(layer, count)
            if not times:
                continue
            ranked = sorted(times, key=lambda config: times[config])
            key = key_of(torch.device("cuda"), DTYPE, features, layer.layout, count)
            TABLE.put({key: ranked[0]})
            text = "  ".join(f"{describe(c)} {times[c] * 1e6:.1f}" for c in ranked[:3])
            yield f"{inner}x{features} {pattern[0]}:{pattern[1]} rows {count}: {text}"
        del layer
        torch.cuda.empty_cache()


def ship() -> None:
    """Merge the user's table into the one that comes with the package."""
    assert TABLE.shipped is not None
    known = json.loads(TABLE.shipped.read_text()) if TABLE.shipped.is_file() else {"entries": {}}
    measured = json.loads(TABLE.path.read_text())
    entries = known["entries"] | measured["entries"]
    document = {"version": measured["version"], "entries": dict(sorted(entries.items()))}
    TABLE.shipped.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _times(layer: Layer, rows: int) -> dict[Config, float]:
    """Seconds by candidate; those that the device refuses (shared memory, library) are left out."""
    times: dict[Config, float] = {}
    for config in candidates(layer.layout, rows):
        try:
            times[config] = layer.seconds(layer.with_config(config), rows)
        except Exception as error:
            print(f"{describe(config)}: {type(error).__name__}", flush=True)
    return times
