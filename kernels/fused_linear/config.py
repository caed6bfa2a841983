"""How a fused linear layer of few rows runs on a GPU: the kernel, its block sizes, its splits."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from fxgraft.kernels.tuning import Key, TunedTable

MOST_ROWS = 64
BUCKETS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Config:
    """One way to run a fused linear layer.

    Attributes:
        kernel: ``"vector"`` multiplies and adds, for one row; ``"matrix"`` uses the tensor cores;
            ``"library"`` calls PyTorch's operators.
        block_n: weight rows of a program.
        block_k: input features of an iteration.
        split_k: programs that share a block of weight rows, each with its part of the features.
        warps: warps of a program.
        stages: iterations whose loads are in flight (``"matrix"``).
        prefetch: input features, a power of 2, that a program asks for before its inputs are
            ready: its first ones, or for ``"vector"`` those after its first block.
    """

    kernel: Literal["vector", "matrix", "library"]
    block_n: int = 0
    block_k: int = 0
    split_k: int = 1
    warps: int = 4
    stages: int = 1
    prefetch: int = 0


TABLE = TunedTable("fused_linear", Config, Path(__file__).parent / "tuned.json")


def bucket_of(rows: int) -> int:
    """The smallest bucket of row counts that holds ``rows`` (1 to 64)."""
    return next(bucket for bucket in BUCKETS if rows <= bucket)


def key_of(device: torch.device, dtype: torch.dtype, features: int, inner: int, rows: int) -> Key:
    """What a tuned configuration depends on, for weights [features, inner]."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Key(name, str(dtype), (features, inner, bucket_of(rows)))


@functools.lru_cache(maxsize=4096)
def config_for(
    device: torch.device, dtype: torch.dtype, features: int, inner: int, rows: int
) -> Config:
    """The tuned configuration where there is one, else a rule's."""
    tuned = TABLE.get(key_of(device, dtype, features, inner, rows))
    return tuned or rule(dtype, features, inner, rows)


def rule(dtype: torch.dtype, features: int, inner: int, rows: int) -> Config:
    """A configuration that is good on an H100, from sizes alone."""
    if rows == 1:
        block_n = _largest_block(features, (16, 8, 4), programs=256)
        return Config("vector", block_n, 512, warps=4)
    if dtype == torch.float32:
        return Config("matrix", 32, 64, _splits(features, inner, 32, 64), warps=4, stages=2)
    block_k = 128 if rows <= 32 else 64
    return Config("matrix", 64, block_k, _splits(features, inner, 64, block_k), stages=4)


def _largest_block(features: int, blocks: tuple[int, ...], programs: int) -> int:
    return next((block for block in blocks if features >= block * programs), blocks[-1])


def _splits(features: int, inner: int, block_n: int, block_k: int, programs: int = 256) -> int:
    """Splits (a power of two) that give about ``programs`` programs, each of two iterations."""
    splits = 1
    blocks = -(-features // block_n)
    while blocks * splits < programs and inner >= 4 * splits * block_k and splits < 16:
        splits *= 2
    return splits


def describe(config: Config) -> str:
    """A configuration in one word, for tables."""
    if config.kernel == "library":
        return "library"
    values = list(asdict(config).values())[1:]
    return config.kernel + " " + "/".join(str(value) for value in values)
