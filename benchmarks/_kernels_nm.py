"""N:M sparse linear layers on a GPU: timing, and choosing configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from fxgraft.kernels.nm_linear.config import TABLE, VECTOR_ROWS, Config, describe, has_tiles, key_of
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
_DISTINCT_BYTES = 256e6
_LEAST_SECONDS = 1e-3
Packed = tuple[Tensor, Tensor]


def random_mask(features: int, inner: int, n: int, m: int) -> Tensor:
    """Bool [features, inner] on the GPU, n random columns of every group of m."""
    scores = torch.rand(features, inner // m, m, device="cuda")
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(-1, scores.topk(n, -1).indices, value=True).view(features, inner)


@dataclass(frozen=True)
class Layer:
    """Packed weights [N, K] of one shape and pattern, as many as no cache holds."""

    inner: int
    features: int
    layout: Layout
    weights: list[Packed]

    @classmethod
    def make(cls, inner: int, features: int, pattern: tuple[int, int]) -> Layer:
        """Random weights."""
        layout = layout_of_columns(inner, *pattern)
        dense = torch.randn(features, inner, dtype=DTYPE, device="cuda").mul_(inner**-0.5)
        first = pack(dense, random_mask(features, inner, *pattern), *pattern)
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
    """What is tried for a number of rows."""
    found = [Config("unpack")]
    if (layout.n, layout.m) == (2, 4) and rows >= 16:
        found.append(Config("sparse"))
    if rows <= VECTOR_ROWS:
        found += [
            Config("vector", 32, warps, split, warps, prefetch=ahead)
            for warps, split, ahead in product((4, 8, 16), (1, 2, 4, 8), (0, 1, 2))
            if warps * split <= max(layout.chunks, 4)
        ]
    if rows > 1 and has_tiles(DTYPE, layout):
        tiles = ((32, 4, 4), (64, 2, 4), (64, 4, 8), (128, 1, 4), (128, 2, 8))
        widest = min(256, max(16, power_of_2(rows)))
        sizes = {8, 16} if rows <= VECTOR_ROWS else {widest, max(16, widest // 2)}
        splits = (1, 2, 4, 8) if rows <= 64 else (1,)
        found += [
            Config("matrix", n, c, split, warps, block_r)
            for (n, c, warps), split, block_r in product(tiles, splits, sorted(sizes))
            if n * block_r <= 128 * 128
        ]
    return found


def tune(shapes: Iterable[tuple[int, int]], rows: Iterable[int]) -> Iterable[str]:
    """Measure all candidates and put the best into the user's table; yields lines to print."""
    for (inner, features), pattern in product(shapes, PATTERNS):
        layer = Layer.make(inner, features, pattern)
        for count in rows:
            times = _times(layer, count)
            ranked = sorted(times, key=lambda config: times[config])
            key = key_of(torch.device("cuda"), DTYPE, features, layer.layout, count)
            TABLE.put({key: ranked[0]})
            text = "  ".join(f"{describe(c)} {times[c] * 1e6:.1f}" for c in ranked[:3])
            yield f"{inner}x{features} {pattern[0]}:{pattern[1]} rows {count}: {text}"
        del layer
        torch.cuda.empty_cache()


def _times(layer: Layer, rows: int) -> dict[Config, float]:
    """Seconds by candidate; those that the device refuses (shared memory, library) are left out."""
    times: dict[Config, float] = {}
    for config in candidates(layer.layout, rows):
        try:
            times[config] = layer.seconds(layer.with_config(config), rows)
        except Exception as error:
            print(f"{describe(config)}: {type(error).__name__}", flush=True)
    return times
