"""How a fused linear layer of few rows runs on a GPU: the kernel, its block sizes, its splits."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

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
    return tuned or _fitted(rule(dtype, features, inner, rows), device, dtype, rows)


def rule(dtype: torch.dtype, features: int, inner: int, rows: int) -> Config:
    """A configuration that is good on an H100, from sizes alone."""
    widest = max(64, 1 << (inner - 1).bit_length())
    if rows == 1:
        block_k = min(widest, 1024 if dtype.itemsize == 2 else 512)
        return Config("vector", 8, block_k, warps=4, prefetch=512)
    if dtype == torch.float32:
        return Config("matrix", 32, 64, _splits(features, inner, 32, 64), warps=4, stages=2)
    if rows > 32:
        return Config("matrix", 32, min(widest, 128), 1, warps=4, stages=6, prefetch=512)
    block_k = min(widest, 512)
    if rows > 16 or features >= 16 * 384:
        return Config("matrix", 16, block_k, 1, warps=2, stages=3, prefetch=512)
    splits = min(2, _splits(features, inner, 32, block_k))
    return Config("matrix", 32, block_k, splits, warps=4, stages=3, prefetch=512)


def _fitted(config: Config, device: torch.device, dtype: torch.dtype, rows: int) -> Config:
    """The same with fewer stages, or smaller ones, where a program has less shared memory."""
    if config.kernel != "matrix" or device.type != "cuda":
        return config
    properties = cast(Any, torch.cuda).get_device_properties(device)
    room = properties.shared_memory_per_block_optin - 4096
    lines = config.block_n + max(16, bucket_of(rows))
    while config.stages * lines * config.block_k * dtype.itemsize > room:
        if config.stages > 2:
            config = replace(config, stages=config.stages - 1)
        else:
            config = replace(config, block_k=config.block_k // 2)
    return config


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
