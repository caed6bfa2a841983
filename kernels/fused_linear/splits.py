"""Sums that several programs share: each leaves its part, the last to arrive adds them up."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_splits(
    total, partial, arrived, block, split, row, rows,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Leave this split's sums; returns whether it is the last one, and then the sums of all.

    Source of the scheme: the threadfence reduction of the CUDA samples. The order of addition is
    that of the splits, whichever comes last.
    """
    STRIDE: tl.constexpr = BLOCK_R * BLOCK_N
    partial += block.to(tl.int64) * SPLIT_K * STRIDE
    mask = (row < rows)[:, None]
    place = row[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(partial + split * STRIDE + place, total, mask=mask)
    tl.debug_barrier()
    is_last = tl.atomic_add(arrived + block, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
    if is_last:
        tl.store(arrived + block, 0)
        total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for other in tl.static_range(SPLIT_K):
            start = partial + other * STRIDE
            total += tl.load(start + place, mask=mask, other=0.0, cache_modifier=".cg")
    return is_last, total
