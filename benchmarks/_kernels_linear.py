"""Linear layers of few rows on a GPU: timing, and choosing configurations."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxgraft.kernels.fused_linear.config import (
    TABLE,
    Config,
    bucket_of,
    config_for,
    describe,
    key_of,
    rule,
)
from fxgraft.kernels.tuning import measure

DTYPE = torch.bfloat16
# K × N: the merged and single layers of Llama-2-7B, and its output layer.
SHAPES = ((4096, 4096), (4096, 12288), (4096, 22016), (11008, 4096), (4096, 32000))
# Those of Llama-3-8B, tuned too.
MORE_SHAPES = ((4096, 6144), (4096, 28672), (14336, 4096), (4096, 128256))
ROWS = (1, 2, 4, 8, 16, 32, 64)
_DISTINCT_BYTES = 256e6
_LEAST_SECONDS = 1e-3


@dataclass(frozen=True)
class Layer:
    """Weights [N, K] of one shape, as many as no cache holds."""

    inner: int
    features: int
    weights: list[Tensor]

    @classmethod
    def make(cls, inner: int, features: int) -> Layer:
        """Random weights."""
        size = inner * features * DTYPE.itemsize
        count = int(-(-_DISTINCT_BYTES // size))
        scale = inner**-0.5
        weights = [
            torch.randn(features, inner, dtype=DTYPE, device="cuda").mul_(scale)
            for _ in range(max(2, count))
        ]
        return cls(inner, features, weights)

    def bytes(self, rows: int) -> int:
        """Bytes of one call: weights, inputs and outputs once."""
        elements = self.inner * self.features + rows * (self.inner + self.features)
        return elements * DTYPE.itemsize

    def seconds(
        self, function: Callable[[Tensor, Tensor], Tensor], rows: int, replays: int = 5
    ) -> float:
        """Time of one call in a CUDA graph of calls on one weight after the other."""
        x = torch.randn(rows, self.inner, dtype=DTYPE, device="cuda")
        calls = max(len(self.weights), int(_LEAST_SECONDS * 3e12 / self.bytes(rows)))
        rotated = [self.weights[i % len(self.weights)] for i in range(calls)]
        return measure([partial(function, x, weight) for weight in rotated], replays)

    def error(self, function: Callable[[Tensor, Tensor], Tensor], rows: int) -> float:
        """Relative error against float64."""
        x = torch.randn(rows, self.inner, dtype=DTYPE, device="cuda")
        weight = self.weights[0]
        expected = linear(x.double(), weight.double())
        return float((function(x, weight).double() - expected).norm() / expected.norm())


def ours(x: Tensor, weight: Tensor) -> Tensor:
    """The op, as a graph calls it."""
    return cast(Any, torch.ops.fxgraft).fused_linear(x, weight)


def with_config(config: Config) -> Callable[[Tensor, Tensor], Tensor]:
    """The op with a given configuration."""
    from fxgraft.kernels.fused_linear import triton

    if config.kernel == "library":
        return linear
    return partial(triton.fused_linear, config=config)


def candidates(rows: int) -> list[Config]:
    """What is tried for a number of rows."""
    found = [rule(DTYPE, 4096, 4096, rows)]
    if rows == 1:
        tiles = [(4, 1024), (4, 2048), (8, 512), (8, 1024), (16, 256), (16, 512), (32, 256)]
        return found + [
            Config("vector", n, k, warps=warps, prefetch=ahead)
            for (n, k), warps, ahead in product(tiles, (4, 8), (0, 512, 2048))
            if 16 <= n * k // (32 * warps) <= 64
        ]
    # Block sizes, warps, and as many stages as leave room for two programs or more.
    tiles = {
        (16, 256, 2): 5, (16, 512, 2): 3, (32, 128, 4): 6, (32, 256, 4): 4, (32, 512, 4): 3,
        (64, 64, 4): 6, (64, 128, 4): 4, (128, 64, 4): 4,
    }  # fmt: skip
    return found + [
        Config("matrix", n, k, split, warps, stages, ahead)
        for ((n, k, warps), stages), split, ahead in product(
            tiles.items(), (1, 2, 4), (0, 512, 2048)
        )
        if rows <= 32 or k <= 256
    ]


def prepare(jobs: Iterable[tuple[int, Config]]) -> None:
    """Compile configurations for numbers of rows, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), context) as pool:
        list(pool.map(_compile, jobs, chunksize=2))


def chosen() -> list[tuple[int, Config]]:
    """What the op runs on ``SHAPES``, to be compiled before it is measured."""
    device = torch.device("cuda")
    found = {
        (max(rows, 2) if config.kernel == "matrix" else 1, config)
        for (inner, features), rows in product(SHAPES, ROWS)
        if (config := config_for(device, DTYPE, features, inner, rows)).kernel != "library"
    }
    return sorted(found, key=str)


def _compile(job: tuple[int, Config]) -> None:
    rows, config = job
    x = torch.zeros(rows, 4096, dtype=DTYPE, device="cuda")
    with_config(config)(x, torch.zeros(512, 4096, dtype=DTYPE, device="cuda"))


def tune(shapes: Iterable[tuple[int, int]]) -> list[str]:
    """Measure all candidates and put the best into the user's table; returns lines to print."""
    lines: list[str] = []
    tuned = (1, 8, 16, 32, 64)
    prepare((rows, config) for rows in tuned for config in candidates(rows))
    for inner, features in shapes:
        layer = Layer.make(inner, features)
        for rows in tuned:
            times = {
                config: layer.seconds(with_config(config), rows)
                for config in (*candidates(rows), Config("library"))
            }
            ranked = sorted(times, key=lambda config: times[config])
            best = ranked[0]
            for bucket in (2, 4, 8) if rows == 8 else (rows,):
                key = key_of(torch.device("cuda"), DTYPE, features, inner, bucket_of(bucket))
                TABLE.put({key: best})
            text = "  ".join(f"{describe(c)} {times[c] * 1e6:.1f}" for c in ranked[:3])
            library = times[Config("library")] * 1e6
            lines.append(f"{inner}x{features} rows {rows}: {text}  library {library:.1f}")
    return lines
