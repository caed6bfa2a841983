"""What the Triton kernels of paged attention share to suppress heads: scores, ranks, factors.

Source: SPIN, arXiv 2505.16411; ranks are counted as in ``fxgraft::head_gate``.
"""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.launch import prefetch
from fxgraft.kernels.paged_attention.pages import rotated


@triton.jit
def is_gated(chosen, gated, token):
    """Whether the token at a place of bool [rows · tokens] is gated: it may not be chosen too."""
    return (tl.load(gated + token) != 0) & (tl.load(chosen + token) == 0)


@triton.jit
def prefetch_sums(
    key_sums, slots, row, kv_head, kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Bring the summed key of one kv head of a row into L2; the slot may be about to change."""
    slot = tl.maximum(tl.load(slots + row, cache_modifier=".cg"), 0)
    LINES: tl.constexpr = (BLOCK_D + 31) // 32
    column = tl.minimum(tl.arange(0, LINES) * 32, HEAD_DIM - 1)
    prefetch(key_sums + (slot * kv_heads + kv_head) * HEAD_DIM + column, PDL)


@triton.jit
def sum_scores(
    query, key_sums, cos, sin, angle_start, query_head, scale, has_past,
    GROUP: tl.constexpr, TOTAL: tl.constexpr, BLOCK_H: tl.constexpr, HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_H] of all heads of one token: queries times the sums of the chosen keys.

    Args:
        query: of the token's first head, not rotated.
        key_sums: [kv heads, HEAD_DIM] of the token's request.
        has_past: whether the sums are those of this request.
        CHUNK: channels that are multiplied at once, a power of 2.
    """
    head = tl.arange(0, BLOCK_H)
    angle = tl.zeros((1, 1), tl.int64) + angle_start
    scores = tl.zeros((BLOCK_H,), tl.float32)
    for start in tl.static_range(0, HEAD_DIM, CHUNK):
        column = start + tl.arange(0, CHUNK)[None, :]
        mask = (head < TOTAL)[:, None] & (column < HEAD_DIM)
        sums = tl.load(
            key_sums + (head // GROUP)[:, None] * HEAD_DIM + column, mask=mask & has_past, other=0.0
        )
        queries = rotated(
            query + (head * query_head)[:, None], column, mask, cos, sin, angle, angle >= 0,
            ROTARY, INTERLEAVED,
        )  # fmt: skip
        scores += tl.sum(queries.to(tl.float32) * sums, axis=1)
    return scores * scale


@triton.jit
def factors(
    scores, first,
    TOTAL: tl.constexpr, BLOCK_H: tl.constexpr, COUNT: tl.constexpr, BLOCK_G: tl.constexpr,
    KEEP: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """What the outputs of the COUNT heads from ``first`` are multiplied by, [BLOCK_G]; 0 behind.

    A head stays if fewer than KEEP are ahead of it: by a higher score, or by a lower index at the
    same one. NaN is the lowest score.

    Args:
        scores: [BLOCK_H], of TOTAL heads.
    """
    head = tl.arange(0, BLOCK_H)[None, :]
    group = tl.arange(0, BLOCK_G)
    mine = (first + group)[:, None]
    is_number = (head < TOTAL) & (scores == scores)[None, :]
    ranked = tl.where(is_number, scores[None, :], float("-inf"))
    own = tl.sum(tl.where(head == mine, ranked, 0.0), axis=1)[:, None]
    ahead = (ranked > own) | ((ranked == own) & (head < mine))
    stays = tl.sum(ahead.to(tl.int32), axis=1) < KEEP
    return tl.where(group < COUNT, tl.where(stays, 1.0, FACTOR), 0.0)


@triton.jit
def gate_by_sums(
    query, key_sums, slots, chosen, gated, row, first, length, kv_heads, cos, sin, angle_start,
    query_head, scale,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, TOTAL: tl.constexpr, BLOCK_H: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    KEEP: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Factors [BLOCK_G] of the heads from ``first`` of a row's only new token.

    Every program of the row computes all scores alike, so that none waits for another.
    """
    gate = tl.where(tl.arange(0, BLOCK_G) < GROUP, 1.0, 0.0)
    if is_gated(chosen, gated, row):
        sums = key_sums + tl.load(slots + row) * kv_heads * HEAD_DIM
        scores = sum_scores(
            query, sums, cos, sin, angle_start, query_head, scale, length > 0,
            GROUP, TOTAL, BLOCK_H, HEAD_DIM, CHUNK, ROTARY, INTERLEAVED,
        )  # fmt: skip
        gate = factors(scores, first, TOTAL, BLOCK_H, GROUP, BLOCK_G, KEEP, FACTOR)
    return gate


@triton.jit
def count_key(
    new_key, key_sums, slots, chosen, row, kv_head, kv_heads, length, is_mine,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add a row's new key [1, D] to its sum if the token is chosen; a first token begins the sum.

    Nobody reads the sum meanwhile: a chosen token is not gated, and a first one has no past.
    """
    column = tl.arange(0, BLOCK_D)[None, :]
    counts = tl.load(chosen + row) != 0
    mask = (column < HEAD_DIM) & is_mine & (counts | (length == 0))
    place = key_sums + (tl.load(slots + row) * kv_heads + kv_head) * HEAD_DIM + column
    total = tl.load(place, mask=mask & (length > 0), other=0.0)
    tl.store(place, total + tl.where(counts, new_key.to(tl.float32), 0.0), mask=mask)


@triton.jit
def scale_row(
    scores, arrived, output,
    TOTAL: tl.constexpr, BLOCK_H: tl.constexpr, COUNT: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr, KEEP: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """The last of COUNT programs that have a row's outputs and scores scales what is suppressed.

    Args:
        scores: float32 [TOTAL], of the row.
        arrived: its counter, 0 before and after.
        output: [TOTAL, VALUE_DIM].
    """
    tl.debug_barrier()
    before = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    if before == COUNT - 1:
        head = tl.arange(0, BLOCK_H)
        mine = tl.load(scores + head, mask=head < TOTAL, other=0.0, cache_modifier=".cg")
        factor = factors(mine, 0, TOTAL, BLOCK_H, TOTAL, BLOCK_H, KEEP, FACTOR)
        for start in tl.static_range(0, VALUE_DIM, CHUNK):
            column = start + tl.arange(0, CHUNK)[None, :]
            mask = ((head < TOTAL) & (factor != 1.0))[:, None] & (column < VALUE_DIM)
            place = output + head[:, None] * VALUE_DIM + column
            value = tl.load(place, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
            tl.store(
                place, scaled_by(value, factor[:, None]).to(output.dtype.element_ty), mask=mask
            )
        tl.store(arrived, 0)


@triton.jit
def gated_part(top, total, mixed, gate):
    """One part of an online softmax [G] with its outputs [G, D] times ``gate`` [G].

    With a factor of 0 nothing of the part is left, NaN neither.
    """
    is_gone = gate == 0.0
    top, total = tl.where(is_gone, 0.0, top), tl.where(is_gone, 1.0, total)
    return top, total, scaled_by(mixed, gate[:, None])


@triton.jit
def scaled_by(value, factor):
    """A product in which a factor of 0 leaves no NaN and no -0."""
    return tl.where(factor == 0.0, 0.0, value * factor)
