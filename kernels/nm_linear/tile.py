"""Unpacks tiles of packed weights of 16 bits, two groups at a time in the halves of a register."""

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

from fxgraft.kernels.nm_linear.decode import kept_bits, load_words, unpack_codes


@triton.jit
def load_pairs(
    pairs, indices, weight_row, chunk, end, chunks, features,
    N: tl.constexpr, LANE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Codes, and the kept weights of pairs of groups, of a chunk [T] of weight rows [T].

    Args:
        pairs: ``values`` as int32, [G / V, N, rows, V / 2].
        indices: as stored.
        weight_row: rows, in range.
        chunk: from ``end`` on weights are 0.
        end: see above.
        chunks: of a weight row.
        features: weight rows.
        N: kept weights of a group.
        LANE: groups of a chunk.
        WORDS: integers of codes of a chunk.
    """
    lane = tl.arange(0, LANE // 2)[None, :]
    place = tl.minimum(chunk, chunks - 1).to(tl.int64)
    words = load_words(indices + place * WORDS * features + weight_row, features, WORDS)
    stored = pairs + ((place * N * features + weight_row) * (LANE // 2))[:, None] + lane
    inside = (chunk < end)[:, None] & (lane < LANE // 2)
    kept = ()
    for n in tl.static_range(N):
        pair = tl.load(stored + n * features * (LANE // 2), mask=inside, other=0)
        kept = kept + (pair.to(tl.uint32, bitcast=True),)
    return words, kept


@triton.jit
def _halves(x):
    """[T, V] as the halves [T, V / 2] of pairs."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _interleave(parts, START: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tensors [T, P] of a tuple, STEP apart, side by side: [T, P · COUNT]."""
    if COUNT == 1:
        whole = parts[START]
    else:
        even = _interleave(parts, START, 2 * STEP, COUNT // 2)
        odd = _interleave(parts, START + STEP, 2 * STEP, COUNT // 2)
        shape: tl.constexpr = (even.shape[0], parts[0].shape[1], COUNT // 2)
        joined = tl.join(tl.reshape(even, shape), tl.reshape(odd, shape))
        whole = tl.reshape(joined, (even.shape[0], parts[0].shape[1] * COUNT))
    return whole


@triton.jit
def dense_tile(
    words, kept,
    N: tl.constexpr, M: tl.constexpr, LANE: tl.constexpr, WORDS: tl.constexpr,
    CODE_BITS: tl.constexpr, POSITION_BITS: tl.constexpr, IS_MASK: tl.constexpr,
):  # fmt: skip
    """Dense weights [T, V · M] as uint16 of what ``load_pairs`` returns.

    Column by column, a group gives its next weight, which is the first of its queue, or 0; a
    select between the halves of two registers serves two groups.
    """
    codes = unpack_codes(words, WORDS, LANE, CODE_BITS)
    low, high = _halves(kept_bits(codes, N, IS_MASK, POSITION_BITS))
    queue = kept
    lows, highs = (), ()
    for column in tl.static_range(M):
        ones = ((low >> column) & 1) | (((high >> column) & 1) << 16)
        here = ones * 0xFFFF
        weight = queue[0] & here
        lows = lows + ((weight & 0xFFFF).to(tl.uint16),)
        highs = highs + ((weight >> 16).to(tl.uint16),)
        moved = ()
        for n in tl.static_range(N):
            # What a queue holds past its end, or cannot give any more, does not matter.
            if n + 1 < N and n < M - 1 - column:
                moved = moved + ((queue[n + 1] & here) | (queue[n] & (here ^ 0xFFFFFFFF)),)
            else:
                moved = moved + (queue[n],)
        queue = moved
    return _interleave(lows + highs, 0, 1, 2 * M)


@triton.jit
def unpack_kernel(
    pairs, indices, dense, features, chunks,
    N: tl.constexpr, M: tl.constexpr, LANE: tl.constexpr, WORDS: tl.constexpr,
    CODE_BITS: tl.constexpr, POSITION_BITS: tl.constexpr, IS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_N rows and BLOCK_C chunks of the dense weight, uint16 [features, K]."""
    WIDTH: tl.constexpr = LANE * M
    thread = tl.arange(0, BLOCK_N * BLOCK_C)
    row = tl.program_id(0) * BLOCK_N + thread % BLOCK_N
    chunk = tl.program_id(1) * BLOCK_C + thread // BLOCK_N
    words, kept = load_pairs(
        pairs, indices, tl.minimum(row, features - 1), chunk, chunks, chunks, features,
        N, LANE, WORDS,
    )  # fmt: skip
    tile = dense_tile(words, kept, N, M, LANE, WORDS, CODE_BITS, POSITION_BITS, IS_MASK)
    column = chunk[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    place = row.to(tl.int64)[:, None] * (chunks * WIDTH) + column
    tl.store(dense + place, tile, mask=(row < features)[:, None] & (chunk < chunks)[:, None])
