"""The Triton kernel of an N:M sparse linear layer for up to 8 rows, on the tensor cores.

A warp multiplies 16 weight rows by up to 8 rows of x with ``mma.m16n8k16``. Thread 4 r + t of a
warp reads the chunks of weight rows r and r + 8 and of row r of x that are t-th of four, and the
order of an mma's inputs is free as long as both operands have the same. So each thread makes its
part of both operands from what it has read, in registers: dense weights of two groups side by side,
by selecting bytes, and the inputs that belong to them.
"""

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
from fxgraft.kernels.launch import wait_for_inputs
from fxgraft.kernels.nm_linear.registers import (
    load_inputs,
    load_weights,
    multiply,
    permute_bytes,
    scale_bfloat16,
)


@triton.jit
def _weight_row(place, block, features, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr):
    """The weight row [T] at a place of a block, in the order of ``weight_rows``."""
    row = tl.minimum(block * BLOCK_N + place, features - 1)
    if ACTIVATION is not None:  # pyright: ignore[reportUnnecessaryComparison]
        row = (row % 2) * (features // 2) + row // 2
    return row


@triton.jit
def _fetch(
    pairs, indices, weight_row, chunk, end, chunks, features,
    N: tl.constexpr, WORDS: tl.constexpr, IS_MASK: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Codes and kept weights of a chunk [T] of some weight rows; from ``end`` on they give 0."""
    inside = chunk < end
    place = tl.minimum(chunk, chunks - 1).to(tl.int64) * features
    words, kept = (), ()
    for index in tl.static_range(len(weight_row)):
        row = weight_row[index]
        for word in tl.static_range(WORDS):
            pointers = indices + place * WORDS + word * features + row
            words = words + (tl.load(pointers, mask=inside, other=0).to(tl.uint32),)
        stored = pairs + (place * N + row) * 4
        for n in tl.static_range(N):
            read = load_weights(stored + n * features * 4, inside, ASSEMBLY)
            if not IS_MASK:
                zero = tl.zeros_like(read[0])
                read = (
                    tl.where(inside, read[0], zero), tl.where(inside, read[1], zero),
                    tl.where(inside, read[2], zero), tl.where(inside, read[3], zero),
                )  # fmt: skip
            kept = kept + read
    return words, kept


@triton.jit
def _bits(
    words, FIRST: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr
):  # fmt: skip
    """16 copies of bit LOW of some words, under 16 of bit HIGH; words from FIRST on."""
    low = words[FIRST + LOW // 32] << (7 - LOW % 8)
    high = words[FIRST + HIGH // 32] << (7 - HIGH % 8)
    CHOICE: tl.constexpr = 0xCC88 + 0x11 * (LOW % 32 // 8) + 0x1100 * (HIGH % 32 // 8)
    return permute_bytes(low, high, CHOICE, ASSEMBLY)


@triton.jit
def _masks(
    words, FIRST: tl.constexpr, PAIR: tl.constexpr, M: tl.constexpr,
    CODE_BITS: tl.constexpr, IS_MASK: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Which of two groups keep each column: M registers whose halves are all ones or 0."""
    LOW: tl.constexpr = 2 * PAIR * CODE_BITS
    HIGH: tl.constexpr = LOW + CODE_BITS
    masks = ()
    for column in tl.static_range(M):
        if IS_MASK:
            mask = _bits(words, FIRST, LOW + column, HIGH + column, ASSEMBLY)
        else:
            mask = tl.full(words[0].shape, 0xFFFFFFFF, tl.uint32)
            for bit in tl.static_range(5):
                if (1 << bit) < M:
                    ones = _bits(words, FIRST, LOW + bit, HIGH + bit, ASSEMBLY)
                    mask &= ones if (column >> bit) % 2 else ones ^ 0xFFFFFFFF
        masks = masks + (mask,)
    return masks


@triton.jit
def _advance(queue, mask, COUNT: tl.constexpr):
    """The first COUNT of a queue move up where a mask says so; the last one has no next."""
    moved = ()
    for n in tl.static_range(len(queue)):
        if n < COUNT and n + 1 < len(queue):
            moved = moved + ((queue[n + 1] & mask) | (queue[n] & (mask ^ 0xFFFFFFFF)),)
        else:
            moved = moved + (queue[n],)
    return moved


@triton.jit
def _dense(
    words, kept, ROW: tl.constexpr, PAIR: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    WORDS: tl.constexpr, CODE_BITS: tl.constexpr, IS_MASK: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Dense columns of two groups, M registers, of one of the weight rows of a thread.

    The left columns take the kept weights in their order, the right ones from the last one back.
    """
    HALF: tl.constexpr = M // 2
    masks = _masks(words, ROW * WORDS, PAIR, M, CODE_BITS, IS_MASK, ASSEMBLY)
    first, last = (), ()
    for n in tl.static_range(N):
        first = first + (kept[4 * (ROW * N + n) + PAIR],)
        last = last + (kept[4 * (ROW * N + N - 1 - n) + PAIR],)
    left, right = (), ()
    for column in tl.static_range(HALF):
        left = left + (first[0] & masks[column],)
        right = (last[0] & masks[M - 1 - column],) + right
        first = _advance(first, masks[column], HALF - 1 - column)
        last = _advance(last, masks[M - 1 - column], HALF - 1 - column)
    return left + right


@triton.jit
def _inputs(
    x, gain, squares, offset, counted, NORM: tl.constexpr,
    M: tl.constexpr, ELEMENT: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Columns of two groups of x, M registers as ``_dense``'s, and the sums of their squares."""
    words = ()
    for part in tl.static_range(M // 4):
        read = load_inputs(x + 4 * part, ASSEMBLY)
        if NORM:
            for k in tl.static_range(0, 4, 2):
                same = (read[k] & counted, read[k + 1] & counted)
                both = (read[k], read[k], read[k + 1], read[k + 1])
                squares = multiply(squares, both, same, ELEMENT, ASSEMBLY)
        if gain is not None:
            gains = load_inputs(gain + 4 * part, ASSEMBLY)
            for k in tl.static_range(4):
                words = words + (scale_bfloat16(read[k], gains[k], offset, ASSEMBLY),)
        else:
            words = words + read
    columns = ()
    for column in tl.static_range(M):
        halves = (words[column // 2], words[M // 2 + column // 2])
        pair = permute_bytes(halves[0], halves[1], 0x5410 + 0x2222 * (column % 2), ASSEMBLY)
        columns = columns + (pair,)
    return columns, squares


@triton.jit
def _add_chunks(
    totals, squares, x, gain, offset, counted, words, kept, NORM: tl.constexpr,
    TILES: tl.constexpr, N: tl.constexpr, M: tl.constexpr, WORDS: tl.constexpr,
    CODE_BITS: tl.constexpr, IS_MASK: tl.constexpr, ELEMENT: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Add the products of each thread's chunk, two groups at a time."""
    for pair in tl.static_range(4):
        there = None if gain is None else gain + pair * M
        columns, squares = _inputs(
            x + pair * M, there, squares, offset, counted, NORM, M, ELEMENT, ASSEMBLY
        )
        added = ()
        for tile in tl.static_range(TILES):
            upper = _dense(words, kept, 2 * tile, pair, N, M, WORDS, CODE_BITS, IS_MASK, ASSEMBLY)
            lower = _dense(
                words, kept, 2 * tile + 1, pair, N, M, WORDS, CODE_BITS, IS_MASK, ASSEMBLY
            )
            sums = totals[tile]
            for k in tl.static_range(0, M, 2):
                weights = (upper[k], lower[k], upper[k + 1], lower[k + 1])
                sums = multiply(sums, weights, (columns[k], columns[k + 1]), ELEMENT, ASSEMBLY)
            added = added + (sums,)
        totals = added
    return totals, squares


@triton.jit
def _zeros(THREADS: tl.constexpr):
    zero = tl.zeros((THREADS,), tl.float32)
    return (zero, zero, zero, zero)


@triton.jit
def _collect(totals, WARPS: tl.constexpr, TILES: tl.constexpr, ACTIVATION: tl.constexpr):
    """Sums over warps, [8, 16 · TILES], of the sums of each thread; places as ``_place`` says."""
    first = tl.join(tl.join(totals[0][0], totals[0][1]), tl.join(totals[0][2], totals[0][3]))
    if TILES == 2:
        rest = tl.join(tl.join(totals[1][0], totals[1][1]), tl.join(totals[1][2], totals[1][3]))
        whole = tl.join(first, rest)
    else:
        whole = first
    # Warp, row r, t, column 2 t or 2 t + 1, upper or lower half of a tile, tile.
    whole = tl.sum(tl.reshape(whole, (WARPS, 8, 4, 2, 2, TILES)), axis=0)
    if ACTIVATION is not None:  # pyright: ignore[reportUnnecessaryComparison]
        whole = tl.permute(whole, (1, 2, 4, 0, 3))
    else:
        whole = tl.permute(whole, (1, 2, 4, 3, 0))
    return tl.reshape(whole, (8, 16 * TILES))


@triton.jit
def _place(row, half, tile, ACTIVATION: tl.constexpr):
    """Place in its block of a weight row; gate and up are the two halves of a tile."""
    if ACTIVATION is not None:  # noqa: SIM108  # pyright: ignore[reportUnnecessaryComparison]
        place = 16 * tile + 2 * row + half
    else:
        place = 16 * tile + 8 * half + row
    return place


@triton.jit(do_not_specialize=["rows"])
def mma_kernel(
    x, pairs, indices, bias, residual, output, partial, arrived, rows, features, chunks,
    norm_weight, eps, offset, NORM: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, WORDS: tl.constexpr, CODE_BITS: tl.constexpr,
    IS_MASK: tl.constexpr, ELEMENT: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, WARPS: tl.constexpr, SPLIT_K: tl.constexpr, AHEAD: tl.constexpr,
    ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N (16 or 32) of the weight rows times x [rows, K]; 4 chunks of each warp at a time.

    x, pairs (the kept weights) and norm_weight come as int32, two elements in each, 16 bytes
    aligned. AHEAD is 1 if weights of the next iteration are loaded before those of this one are
    used; the first ones are loaded before x exists.
    """
    TILES: tl.constexpr = BLOCK_N // 16
    STEP: tl.constexpr = 4 * WARPS
    block, split = tl.program_id(0), tl.program_id(1)
    thread = tl.arange(0, 32 * WARPS)
    row, mine = thread % 32 // 4, thread // 32 * 4 + thread % 4
    weight_row = ()
    for half in tl.static_range(2 * TILES):
        place = _place(row, half % 2, half // 2, ACTIVATION)
        weight_row = weight_row + (_weight_row(place, block, features, ACTIVATION, BLOCK_N),)
    part = tl.cdiv(tl.cdiv(chunks, STEP), SPLIT_K) * STEP
    begin, end = split * part, tl.minimum((split + 1) * part, chunks)
    words, kept = _fetch(
        pairs, indices, weight_row, begin + mine, end, chunks, features, N, WORDS, IS_MASK, ASSEMBLY
    )
    wait_for_inputs(PDL)
    # A register holds two inputs; rows past the last repeat it, and are not stored.
    x += tl.minimum(row, rows - 1) * (chunks * 4 * M)
    totals = ()
    for _ in tl.static_range(TILES):
        totals = totals + (_zeros(32 * WARPS),)
    squares = _zeros(32 * WARPS)
    for start in range(begin, end, STEP):
        chunk = start + mine
        if AHEAD:
            next_words, next_kept = _fetch(
                pairs, indices, weight_row, chunk + STEP, end, chunks, features,
                N, WORDS, IS_MASK, ASSEMBLY,
            )  # fmt: skip
        column = tl.minimum(chunk, chunks - 1) * (4 * M)
        gain = None if norm_weight is None else norm_weight + column
        # What lies past the end is read, but must not be measured.
        counted = tl.where(chunk < end, 0xFFFFFFFF, 0).to(tl.uint32) if NORM else None
        totals, squares = _add_chunks(
            totals, squares, x + column, gain, offset, counted, words, kept, NORM, TILES,
            N, M, WORDS, CODE_BITS, IS_MASK, ELEMENT, ASSEMBLY,
        )  # fmt: skip
        if not AHEAD:
            next_words, next_kept = _fetch(
                pairs, indices, weight_row, chunk + STEP, end, chunks, features,
                N, WORDS, IS_MASK, ASSEMBLY,
            )  # fmt: skip
        words, kept = next_words, next_kept
    total = _collect(totals, WARPS, TILES, ACTIVATION)
    is_last = True
    if SPLIT_K > 1:
        is_last, total = add_splits(
            total, partial, arrived, block, split, tl.arange(0, 8), rows, 8, BLOCK_N, SPLIT_K
        )
    if is_last:
        if NORM:
            total *= tl.rsqrt(tl.sum(squares[0], axis=0) / (256 * M * chunks) + eps)
        finish(
            total, bias, residual, output, block, tl.arange(0, 8), rows, features,
            ACTIVATION, BLOCK_N,
        )  # fmt: skip
