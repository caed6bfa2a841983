"""How the Triton kernels of paged attention run: block sizes and splits, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Programs that a row's splits and kv heads are to give: about two for each processor of an H100.
_PROGRAMS = 256
_MOST_SPLITS = 64
_LEAST = 64


@dataclass(frozen=True)
class DecodeConfig:
    """How one step runs.

    Attributes:
        splits: most programs that share a row's kv head, a power of 2.
        least: tokens that a program has at least, a multiple of ``tile``.
        tile: tokens of an iteration, a power of 2.
        warps: warps of a program.
        stages: iterations whose loads are in flight.
        prefetch: tokens that a program asks for before its inputs are ready, a power of 2.
    """

    splits: int
    least: int
    tile: int
    warps: int
    stages: int
    prefetch: int


@dataclass(frozen=True)
class PrefillConfig:
    """How several tokens per row run.

    Attributes:
        block_m: queries of a program.
        tile: keys of an iteration.
        warps: warps of a program.
        stages: iterations whose loads are in flight.
    """

    block_m: int
    tile: int
    warps: int
    stages: int


def decode_config(dtype: torch.dtype, kv_heads: int, group: int, width: int) -> DecodeConfig:
    """The configuration of a step; the batch has no say, so that a row's result has not either.

    Args:
        dtype: of the caches.
        kv_heads: key and value heads.
        group: query heads of a kv head.
        width: channels of a key or value, whichever has more, as a power of 2.
    """
    splits = 1
    while splits < _MOST_SPLITS and kv_heads * splits < _PROGRAMS:
        splits *= 2
    entry = width * dtype.itemsize
    prefetch = max(16, min(64, 16384 // entry))
    if group == 1:
        tile = max(8, min(_LEAST, 8192 // entry))
        return DecodeConfig(splits, _LEAST, tile, warps=4, stages=1, prefetch=prefetch)
    tile = 16 if dtype == torch.float32 else 64 if width <= 128 else 32
    warps = 8 if group > 32 or entry > 512 else 4
    return DecodeConfig(splits, _LEAST, tile, warps, stages=3, prefetch=prefetch)


def prefill_config(dtype: torch.dtype, tokens: int, width: int) -> PrefillConfig:
    """The configuration for new tokens.

    Args:
        dtype: of the caches.
        tokens: new tokens of a row.
        width: channels of a key or value, whichever has more, as a power of 2.
    """
    if dtype == torch.float32:
        tile = 32 if width <= 128 else 16
        return PrefillConfig(32, tile, warps=4 if width <= 64 else 8, stages=1)
    block_m = 64 if tokens <= 64 or width > 128 else 128
    warps = 8 if block_m == 128 or width > 128 else 4
    return PrefillConfig(block_m, 64, warps, stages=2)
