"""How the Triton kernels of paged attention run: block sizes and splits, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Programs that a step is to have at least: about two for each processor of an H100, or about one.
_PROGRAMS, _LARGE_PROGRAMS = 256, 128
_MOST_SPLITS = 32
_LEAST = 64
_LONGEST = 4096


@dataclass(frozen=True)
class DecodeConfig:
    """How one step runs.

    Attributes:
        splits: programs that share a row's kv head, a power of 2.
        least: fewer programs share it if one would have fewer tokens; a multiple of ``tile``.
        longest: more programs share it if one would have more tokens, a multiple of ``least``.
        dots: whether the tensor cores multiply; they take one query head for 16.
        tile: tokens of an iteration, a power of 2.
        lanes: softmaxes that share a tile with ``dots``, a power of 2.
        warps: warps of a program.
        stages: iterations whose loads are in flight.
        prefetch: tokens that a program asks for before its inputs are ready, a power of 2.
    """

    splits: int
    least: int
    longest: int
    dots: bool
    tile: int
    lanes: int
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


def decode_config(
    dtype: torch.dtype, rows: int, kv_heads: int, group: int, width: int
) -> DecodeConfig:
    """The configuration of a step.

    How a row is split decides how its result is rounded. It may depend on the number of rows, as
    in ``fxgraft::fused_linear``, but not in float32.

    Args:
        dtype: of the caches.
        rows: rows of the batch.
        kv_heads: key and value heads.
        group: query heads of a kv head.
        width: channels of a key or value, whichever has more, as a power of 2.
    """
    entry = width * dtype.itemsize
    fits = dtype != torch.float32 and width <= 128 and group <= 16
    splits, most = 1, _MOST_SPLITS if kv_heads >= 4 else 2 * _MOST_SPLITS
    pairs = kv_heads * (1 if dtype == torch.float32 else rows)
    # The parts of many query heads take long to add up.
    wanted = _LARGE_PROGRAMS if fits and group > 4 else _PROGRAMS
    while splits < most and pairs * splits < wanted:
        splits *= 2
    if fits:
        return DecodeConfig(
            splits, 2 * _LEAST, _LONGEST, dots=True, tile=64, lanes=4, warps=4, stages=3,
            prefetch=128,
        )  # fmt: skip
    prefetch = max(16, min(128, 32768 // entry))
    if group == 1:
        tile = 16 if width > 128 else min(_LEAST, 16384 // entry)
        return DecodeConfig(
            splits, _LEAST, _LONGEST, dots=False, tile=tile, lanes=1, warps=8, stages=2,
            prefetch=prefetch,
        )  # fmt: skip
    tile = 16 if dtype == torch.float32 else 64 if width <= 128 else 32
    warps = 8 if group > 32 or entry > 512 else 4
    return DecodeConfig(
        splits, 2 * _LEAST, _LONGEST, dots=True, tile=tile, lanes=1, warps=warps, stages=3,
        prefetch=prefetch,
    )  # fmt: skip


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
