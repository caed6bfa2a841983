"""The Triton kernel of an N:M sparse linear layer for some rows: tiles go to the tensor cores."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.fused_linear.epilogue import finish
from fxgraft.kernels.fused_linear.splits import add_splits
from fxgraft.kernels.fused_linear.weights import weight_rows
from fxgraft.kernels.launch import wait_for_inputs
from fxgraft.kernels.nm_linear.tile import dense_tile, load_pairs


@triton.jit
def _inputs(x, row, rows, start, end, inner, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K inputs [BLOCK_K, R] from a chunk on, 0 from chunk ``end`` on."""
    column = start * WIDTH + tl.arange(0, BLOCK_K)
    mask = (row < rows)[None, :] & (column < end * WIDTH)[:, None]
    return tl.load(x + row.to(tl.int64)[None, :] * inner + column[:, None], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def matrix_kernel(
    x, pairs, indices, bias, residual, output, partial, arrived, rows, features, chunks,
    N: tl.constexpr, M: tl.constexpr, LANE: tl.constexpr, WORDS: tl.constexpr,
    CODE_BITS: tl.constexpr, POSITION_BITS: tl.constexpr, IS_MASK: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, SPLIT_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N of the weight rows times BLOCK_R rows of x [rows, K]; chunks in splits.

    The weights of the next iteration are loaded before those of this one are used, the first ones
    before x exists.
    """
    THREADS: tl.constexpr = BLOCK_N * BLOCK_C
    WIDTH: tl.constexpr = LANE * M
    block, split = tl.program_id(0), tl.program_id(1)
    index = weight_rows(block, features, ACTIVATION, BLOCK_N)
    weight_row = tl.reshape(tl.broadcast_to(index[None, :], (BLOCK_C, BLOCK_N)), (THREADS,))
    mine = tl.arange(0, THREADS) // BLOCK_N
    part = tl.cdiv(tl.cdiv(chunks, BLOCK_C), SPLIT_K) * BLOCK_C
    begin, end = split * part, tl.minimum((split + 1) * part, chunks)
    words, kept = load_pairs(
        pairs, indices, weight_row, begin + mine, end, chunks, features, N, LANE, WORDS
    )
    wait_for_inputs(PDL)
    row = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_C):
        value = _inputs(x, row, rows, start, end, chunks * WIDTH, WIDTH, BLOCK_C * WIDTH)
        next_words, next_kept = load_pairs(
            pairs, indices, weight_row, start + BLOCK_C + mine, end, chunks, features,
            N, LANE, WORDS,
        )  # fmt: skip
        tile = dense_tile(words, kept, N, M, LANE, WORDS, CODE_BITS, POSITION_BITS, IS_MASK)
        tile = tl.permute(tl.reshape(tile, (BLOCK_C, BLOCK_N, WIDTH)), (1, 0, 2))
        tile = tl.reshape(tile, (BLOCK_N, BLOCK_C * WIDTH)).to(value.dtype, bitcast=True)
        total = tl.dot(tile, value, total)
        words, kept = next_words, next_kept
    total = tl.trans(total)
    is_last = True
    if SPLIT_K > 1:
        blocks = tl.num_programs(0)
        is_last, total = add_splits(
            total, partial, arrived, tl.program_id(2) * blocks + block, split,
            tl.arange(0, BLOCK_R), rows - tl.program_id(2) * BLOCK_R, BLOCK_R, BLOCK_N, SPLIT_K,
        )  # fmt: skip
    if is_last:
        finish(total, bias, residual, output, block, row, rows, features, ACTIVATION, BLOCK_N)
