"""The Triton kernel of an N:M sparse linear layer for few rows: gather inputs, multiply and add."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# Its compiler takes no starred items.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.fused_linear.epilogue import finish
from fxgraft.kernels.fused_linear.splits import add_splits
from fxgraft.kernels.fused_linear.weights import weight_rows
from fxgraft.kernels.launch import prefetch, wait_for_inputs
from fxgraft.kernels.nm_linear.decode import load_words, take_position, unpack_codes


@triton.jit
def _zeros(THREADS: tl.constexpr, LANE: tl.constexpr, ROWS: tl.constexpr):
    """One sum for each input row, thread and lane."""
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros((THREADS, LANE), tl.float32),)
    return totals


@triton.jit
def _fetch(
    values, indices, weight_row, chunk, end, chunks, features,
    N: tl.constexpr, LANE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Codes and kept weights of a chunk [T] of weight rows [T]; weights from ``end`` on are 0.

    All loads are asked for before any is used. Past the last chunk its codes are read again, so
    that all positions are in range.
    """
    lane = tl.arange(0, LANE)[None, :]
    place = tl.minimum(chunk, chunks - 1).to(tl.int64)
    words = load_words(indices + place * WORDS * features + weight_row, features, WORDS)
    stored = values + ((place * N * features + weight_row) * LANE)[:, None] + lane
    inside = (chunk < end)[:, None] & (lane < LANE)
    kept = ()
    for n in tl.static_range(N):
        kept = kept + (tl.load(stored + n * features * LANE, mask=inside, other=0.0),)
    return words, kept


@triton.jit
def _prefetch(
    values, indices, weight_row, chunk, chunks, features,
    N: tl.constexpr, LANE: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Bring what ``_fetch`` reads into L2."""
    place = tl.minimum(chunk, chunks - 1).to(tl.int64)
    for n in tl.static_range(N):
        prefetch(values + ((place * N + n) * features + weight_row) * LANE, PDL)
    prefetch(indices + place * WORDS * features + weight_row, PDL)


@triton.jit
def _add_chunk(
    totals, x, words, kept, chunk, end, chunks, norm_weight, offset,
    N: tl.constexpr, M: tl.constexpr, LANE: tl.constexpr, WORDS: tl.constexpr,
    CODE_BITS: tl.constexpr, POSITION_BITS: tl.constexpr, IS_MASK: tl.constexpr,
    INNER: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Add the products of a chunk [T] to the sums of each input row."""
    lane = tl.arange(0, LANE)[None, :]
    inside = None if EVEN else (chunk < end)[:, None] & (lane < LANE)
    codes = unpack_codes(words, WORDS, LANE, CODE_BITS)
    group = (tl.minimum(chunk, chunks - 1) * (LANE * M))[:, None] + lane * M
    for n in tl.static_range(N - 1, -1, -1):
        column, codes = take_position(codes, n, IS_MASK, POSITION_BITS, ASSEMBLY)
        value = kept[n].to(tl.float32)
        if norm_weight is not None:
            value *= _load(norm_weight + group + column, inside).to(tl.float32) + offset
        added = ()
        for row in tl.static_range(ROWS):
            # A constant offset from one address costs no instruction.
            chosen = _load(x + group + column + row * INNER, inside).to(tl.float32)
            added = added + (totals[row] + value * chosen,)
        totals = added
    return totals


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _inverse_size(x, eps, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """1 / sqrt(mean(x²) + eps) of a row [INNER], float32; BLOCK inputs at a time."""
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, INNER, BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(x + place, mask=place < INNER, other=0.0).to(tl.float32)
        squares += value * value
    return tl.rsqrt(tl.sum(squares, axis=0) / INNER + eps)


@triton.jit
def vector_kernel(
    x, values, indices, bias, residual, output, partial, arrived, features, chunks,
    norm_weight, eps, offset, NORM: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, LANE: tl.constexpr, WORDS: tl.constexpr,
    CODE_BITS: tl.constexpr, POSITION_BITS: tl.constexpr, IS_MASK: tl.constexpr,
    INNER: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    SPLIT_K: tl.constexpr, PREFETCH: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N of the weight rows times x [ROWS, INNER]; BLOCK_C chunks at a time, in splits.

    With NORM x is one row, which every program measures as a whole and scales as it gathers.

    The weights of the next iteration are loaded before those of this one are used, the first ones
    before x exists.
    """
    THREADS: tl.constexpr = BLOCK_N * BLOCK_C
    block, split = tl.program_id(0), tl.program_id(1)
    thread = tl.arange(0, THREADS)
    weight_row = tl.reshape(
        tl.broadcast_to(
            weight_rows(block, features, ACTIVATION, BLOCK_N)[None, :], (BLOCK_C, BLOCK_N)
        ),
        (THREADS,),
    )
    mine = thread // BLOCK_N
    part = tl.cdiv(tl.cdiv(chunks, BLOCK_C), SPLIT_K) * BLOCK_C
    begin, end = split * part, tl.minimum((split + 1) * part, chunks)
    for ahead in tl.static_range(1, PREFETCH + 1):
        _prefetch(
            values, indices, weight_row, begin + ahead * BLOCK_C + mine, chunks, features,
            N, LANE, WORDS, PDL,
        )  # fmt: skip
    words, kept = _fetch(
        values, indices, weight_row, begin + mine, end, chunks, features, N, LANE, WORDS
    )
    wait_for_inputs(PDL)
    totals = _zeros(THREADS, LANE, ROWS)
    scale = _inverse_size(x, eps, INNER, 1024) if NORM else 1.0
    for start in range(begin, end, BLOCK_C):
        chunk = start + mine
        next_words, next_kept = _fetch(
            values, indices, weight_row, chunk + BLOCK_C, end, chunks, features, N, LANE, WORDS
        )
        totals = _add_chunk(
            totals, x, words, kept, chunk, end, chunks, norm_weight, offset,
            N, M, LANE, WORDS, CODE_BITS, POSITION_BITS, IS_MASK, INNER, ROWS, EVEN, ASSEMBLY,
        )  # fmt: skip
        words, kept = next_words, next_kept
    row = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for index in tl.static_range(ROWS):
        parts = tl.reshape(tl.sum(totals[index], axis=1), (BLOCK_C, BLOCK_N))
        total = tl.where((row == index)[:, None], tl.sum(parts, axis=0)[None, :], total)
    is_last = True
    if SPLIT_K > 1:
        is_last, total = add_splits(
            total, partial, arrived, block, split, row, ROWS, BLOCK_R, BLOCK_N, SPLIT_K
        )
    if is_last:
        if NORM:
            total *= scale
        finish(total, bias, residual, output, block, row, ROWS, features, ACTIVATION, BLOCK_N)
