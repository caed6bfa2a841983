"""The Triton kernel of a fused linear layer for 2 to 64 rows, on the tensor cores."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.fused_linear.epilogue import finish
from fxgraft.kernels.fused_linear.splits import add_splits
from fxgraft.kernels.fused_linear.weights import prefetch_weights, weight_rows
from fxgraft.kernels.launch import wait_for_inputs


@triton.jit
def _multiply(
    x, weight, weight_row, row, rows, begin, end, inner,
    EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Products [BLOCK_R, BLOCK_N] over input features begin..end."""
    k = tl.arange(0, BLOCK_K)
    x_pointers = x + row[:, None] * inner + k[None, :]
    weight_pointers = weight + weight_row.to(tl.int64)[None, :] * inner + k[:, None]
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        here = start + k
        mask = (row < rows)[:, None]
        if EVEN:
            tile = tl.load(weight_pointers + start)
        else:
            mask = mask & (here < end)[None, :]
            tile = tl.load(weight_pointers + start, mask=(here < end)[:, None], other=0.0)
        value = tl.load(x_pointers + start, mask=mask, other=0.0)
        total = tl.dot(value, tile, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["rows"])
def matrix_kernel(
    x, weight, bias, residual, output, partial, arrived, rows, features, inner,
    ACTIVATION: tl.constexpr, EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N of the N = ``features`` weight rows times x [rows, K = ``inner``], K in splits."""
    block, split = tl.program_id(0), tl.program_id(1)
    weight_row = weight_rows(block, features, ACTIVATION, BLOCK_N)
    row = tl.arange(0, BLOCK_R)
    part = tl.cdiv(tl.cdiv(inner, BLOCK_K), SPLIT_K) * BLOCK_K
    begin, end = split * part, tl.minimum((split + 1) * part, inner)
    prefetch_weights(weight, weight_row, begin, inner, PREFETCH, PDL)
    wait_for_inputs(PDL)
    total = _multiply(
        x, weight, weight_row, row, rows, begin, end, inner,
        EVEN, BLOCK_R, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    is_last = True
    if SPLIT_K > 1:
        is_last, total = add_splits(
            total, partial, arrived, block, split, row, rows, BLOCK_R, BLOCK_N, SPLIT_K
        )
    if is_last:
        finish(total, bias, residual, output, block, row, rows, features, ACTIVATION, BLOCK_N)
