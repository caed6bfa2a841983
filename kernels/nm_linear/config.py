"""How an N:M sparse linear layer runs on a GPU: the kernel, its block sizes, its splits."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from fxgraft.kernels.launch import power_of_2
from fxgraft.kernels.nm_linear.layout import Layout
from fxgraft.kernels.tuning import Key, TunedTable

Kernel = Literal["mma", "vector", "matrix", "unpack", "sparse"]
# Most rows of the kernels "mma" and "vector".
FEW_ROWS = 8
# The least columns of a tile on the tensor cores.
_DEPTH = 16
# Weight rows that give each multiprocessor of an H100 four programs of 16.
_MANY_FEATURES = 16 * 528


@dataclass(frozen=True)
class Config:
    """One way to run an N:M sparse linear layer.

    Attributes:
        kernel: ``"mma"`` makes fragments for the tensor cores in registers, up to 8 rows of 16-bit
            types; ``"vector"`` gathers inputs, multiplies and adds, up to 8 rows; ``"matrix"``
            unpacks tiles on their way to the tensor cores; ``"unpack"`` writes the dense weight,
            then calls PyTorch; ``"sparse"`` calls cuSPARSELt (2:4 only), which keeps a second
            copy of the weight in its own form.
        block_n: weight rows of a program, a multiple of 32; 16 or 32 for ``"mma"``.
        block_c: chunks that a program reads at a time; 4 for each warp for ``"mma"``.
        split_k: programs that share a block of weight rows, each with its part of the chunks.
        warps: warps of a program.
        block_r: input rows of a program (``"matrix"``).
        prefetch: times ``block_c`` chunks, after the first, that a program asks for before its
            inputs are ready; for ``"mma"`` 1 or 0 iterations whose weights are loaded early.
    """

    kernel: Kernel
    block_n: int = 0
    block_c: int = 0
    split_k: int = 1
    warps: int = 4
    block_r: int = 0
    prefetch: int = 0


TABLE = TunedTable("nm_linear", Config, Path(__file__).parent / "tuned.json")


def key_of(
    device: torch.device, dtype: torch.dtype, features: int, layout: Layout, rows: int
) -> Key:
    """What a tuned configuration depends on; rows count in powers of 2."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    sizes = (features, layout.columns, layout.n, layout.m, power_of_2(rows))
    return Key(name, str(dtype), sizes)


@functools.lru_cache(maxsize=4096)
def config_for(
    device: torch.device, dtype: torch.dtype, features: int, layout: Layout, rows: int
) -> Config:
    """The tuned configuration where there is one, else a rule's."""
    tuned = TABLE.get(key_of(device, dtype, features, layout, rows))
    return tuned or rule(dtype, features, layout, rows)


def rule(dtype: torch.dtype, features: int, layout: Layout, rows: int) -> Config:
    """A configuration from sizes alone; cuSPARSELt is left to measured tables."""
    gathers = has_fragments(dtype, layout) and _gathers_faster(layout, rows)
    if rows <= FEW_ROWS and has_fragments(dtype, layout) and not gathers:
        return _fragments(features, layout)
    few = FEW_ROWS if dtype == torch.float32 or not has_tiles(dtype, layout) else 4
    if rows <= few:
        return Config("vector", 32, 8, _splits(features, layout, 32, 8), warps=8, prefetch=1)
    if not has_tiles(dtype, layout) or rows > 512:
        return Config("unpack")
    block_n = 64 if features >= 64 * 256 or rows > 64 else 32
    block_c = max(1, 128 // block_n)
    if block_c * layout.lane * layout.m < _DEPTH:
        return Config("unpack")
    splits = _splits(features, layout, block_n, block_c) if rows <= 64 else 1
    block_r = min(128, max(16, power_of_2(rows)))
    return Config("matrix", block_n, block_c, splits, warps=4, block_r=block_r, prefetch=1)


def has_tiles(dtype: torch.dtype, layout: Layout) -> bool:
    """Whether weights can be unpacked into tiles for the tensor cores.

    Pairs of groups are unpacked at once in the halves of 32-bit registers, and a tile's sizes are
    powers of 2.
    """
    return dtype.itemsize == 2 and layout.lane > 1 and layout.m == power_of_2(layout.m)


def has_fragments(dtype: torch.dtype, layout: Layout) -> bool:
    """Whether the kernel ``"mma"`` takes the layout: chunks of 8 groups of 4, 8 or 16.

    Where codes are positions, groups keep one weight.
    """
    takes = layout.lane == 8 and layout.m in (4, 8, 16)
    return dtype.itemsize == 2 and takes and (layout.is_mask or layout.n == 1)


def _fragments(features: int, layout: Layout) -> Config:
    """Of ``"mma"``, as measured on an H100: many small programs, or fewer large ones.

    A program has at least one iteration.
    """
    if features >= _MANY_FEATURES or layout.n > 4:
        tiles, warps = (2 if (layout.n, layout.m) == (2, 8) else 1), 4
    else:
        tiles, warps = 2, 8
    while warps > 1 and 4 * warps > layout.chunks:
        warps //= 2
    return Config("mma", 16 * tiles, 4 * warps, 1, warps, prefetch=1)


def _gathers_faster(layout: Layout, rows: int) -> bool:
    """Whether one row is too little work for tensor cores: where a group keeps a quarter or less.

    Fragments are built for all columns, gathers are made for those that are kept.
    """
    return rows == 1 and 4 * layout.n <= layout.m


def _splits(features: int, layout: Layout, block_n: int, block_c: int, programs: int = 384) -> int:
    """Splits (a power of two) that give about ``programs`` programs, each of two iterations."""
    splits = 1
    blocks = -(-features // block_n)
    while blocks * splits < programs and layout.chunks >= 4 * splits * block_c and splits < 16:
        splits *= 2
    return splits


def describe(config: Config) -> str:
    """A configuration in one word, for tables."""
    if config.kernel in ("unpack", "sparse"):
        return config.kernel
    values = list(asdict(config).values())[1:]
    return config.kernel + " " + "/".join(str(value) for value in values)
