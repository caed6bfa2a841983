"""The Triton kernels that suppress heads of several new tokens per row.

One scores the gated tokens for each head, by the sum of logits or by the share of attention that
chosen keys get; the other ranks the heads and scales outputs in place. Programs without a gated
token have nothing to do: of a prompt usually only the last token is gated.
"""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.launch import wait_for_inputs
from fxgraft.kernels.paged_attention.gating import scaled_by
from fxgraft.kernels.paged_attention.pages import LOG2_E, LOWEST, entries, scaled


@triton.jit
def _gated_tokens(chosen, gated, past, row, token, tokens):
    """Which tokens of a block are gated, and the row's past, -1 if it has no request."""
    is_new = token < tokens
    place = row * tokens + token
    flags = tl.load(gated + place, mask=is_new, other=0) != 0
    flags = flags & (tl.load(chosen + place, mask=is_new, other=1) == 0)
    length = tl.load(past + row)
    return flags & (length >= 0), length


@triton.jit
def _add_blocks(total, block_sums, count, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``total`` [BLOCK_D] and the sums of the first ``count`` blocks of tokens."""
    column = tl.arange(0, BLOCK_D)
    for start in range(0, count, 16):
        block = start + tl.arange(0, 16)
        mask = (block < count)[:, None] & (column < HEAD_DIM)[None, :]
        place = block_sums + block[:, None] * HEAD_DIM + column[None, :]
        total += tl.sum(tl.load(place, mask=mask, other=0.0), axis=0)
    return total


@triton.jit
def sum_kernel(
    query, key_cache, table, past, chosen, gated, key_sums, slots, block_sums, scores,
    query_row, query_head, query_token, key_page, key_cache_head, key_entry, table_row, tokens,
    scale,
    GROUP: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Score gated tokens of one head by the sum of their logits with chosen keys before them.

    Grid (blocks of BLOCK_S tokens, heads, rows), after ``write_kernel`` with the same blocks.

    Args:
        query: rotated.
        chosen, gated: uint8 [rows, tokens].
        key_sums: float32 [slots, kv heads, HEAD_DIM], over the tokens before these.
        block_sums: as ``write_kernel`` leaves them.
        scores: float32 [rows, tokens, heads], written where a token is gated.
    """
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head, kv_heads = head // GROUP, tl.num_programs(1) // GROUP
    token, column = block * BLOCK_S + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    wait_for_inputs(PDL)
    flags, length = _gated_tokens(chosen, gated, past, row, token, tokens)
    if tl.max(flags.to(tl.int32), axis=0) > 0:
        place = key_sums + (tl.load(slots + row) * kv_heads + kv_head) * HEAD_DIM + column
        total = tl.load(place, mask=(column < HEAD_DIM) & (length > 0), other=0.0)
        block_sums += (row * kv_heads + kv_head) * tl.num_programs(0) * HEAD_DIM
        total = _add_blocks(total, block_sums, block, HEAD_DIM, BLOCK_D)
        start = query + row * query_row + head * query_head + token.to(tl.int64) * query_token
        mask = flags[:, None] & (column < HEAD_DIM)[None, :]
        queries = tl.load(start[:, None] + column[None, :], mask=mask, other=0.0)
        score = tl.sum(queries.to(tl.float32) * total[None, :], axis=1)
        is_new = token < tokens
        counts = tl.load(chosen + row * tokens + token, mask=is_new, other=0) != 0
        if tl.max(counts.to(tl.int32), axis=0) > 0:
            keys = entries(
                length + token, is_new, table + row * table_row, key_page, key_entry, PAGE
            )
            keys = key_cache + kv_head * key_cache_head + keys[None, :] + column[:, None]
            key_mask = (column < HEAD_DIM)[:, None] & counts[None, :]
            key = tl.load(keys, mask=key_mask, other=0.0)
            logits = tl.dot(queries, key, input_precision="ieee")
            before = counts[None, :] & (token[None, :] <= token[:, None])
            score += tl.sum(tl.where(before, logits, 0.0), axis=1)
        place = (row * tokens + token) * tl.num_programs(1) + head
        tl.store(scores + place, score * scale, mask=flags)


@triton.jit
def share_kernel(
    query, key_cache, chosen_cache, table, past, sinks, chosen, gated, scores, query_row,
    query_head, query_token, key_page, key_cache_head, key_entry, table_row, tokens, scale,
    GROUP: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Score gated tokens of one head by the share of their attention that chosen keys get.

    Grid (blocks of BLOCK_S tokens, heads, rows), over caches that hold the new tokens too; the
    arguments are those of ``sum_kernel`` and ``prefill_kernel``.
    """
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token, column = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    table += row * table_row
    key_cache += head // GROUP * key_cache_head
    wait_for_inputs(PDL)
    flags, length = _gated_tokens(chosen, gated, past, row, token, tokens)
    if tl.max(flags.to(tl.int32), axis=0) > 0:
        position = length + token
        start = query + row * query_row + head * query_head + token.to(tl.int64) * query_token
        mask = flags[:, None] & (column < HEAD_DIM)[None, :]
        queries = tl.load(start[:, None] + column[None, :], mask=mask, other=0.0)
        top = tl.full((BLOCK_S,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_S,), tl.float32)
        looked = total
        end = length + tl.max(tl.where(flags, token, 0), axis=0) + 1
        begin = 0
        if WINDOW > 0:
            earliest = tl.min(tl.where(flags, position, end), axis=0)
            begin = tl.maximum(earliest + 1 - WINDOW, 0)
        for first in tl.range(begin, end, TILE, num_stages=STAGES):
            other = first + tl.arange(0, TILE)
            is_real = other < end
            keys = entries(other, is_real, table, key_page, key_entry, PAGE)
            key_mask = (column < HEAD_DIM)[:, None] & is_real[None, :]
            key = tl.load(key_cache + keys[None, :] + column[:, None], mask=key_mask, other=0.0)
            flag = entries(other, is_real, table, PAGE, 1, PAGE)
            counts = tl.load(chosen_cache + flag, mask=is_real, other=0) != 0
            score = scaled(tl.dot(queries, key, input_precision="ieee"), scale, SOFTCAP)
            visible = is_real[None, :] & (other[None, :] <= position[:, None])
            if WINDOW > 0:
                visible = visible & (other[None, :] > position[:, None] - WINDOW)
            score = tl.where(visible, score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, axis=1))
            weight, decay = tl.exp2(score - higher[:, None]), tl.exp2(top - higher)
            total = total * decay + tl.sum(weight, axis=1)
            looked = looked * decay + tl.sum(tl.where(counts[None, :], weight, 0.0), axis=1)
            top = higher
        if sinks is not None:
            total += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2_E - top)
        place = (row * tokens + token) * tl.num_programs(1) + head
        tl.store(scores + place, looked / total, mask=flags)


@triton.jit
def _bring_up_sums(
    key_sums, slots, block_sums, row, head, is_mine, has_past,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the sums of all blocks of tokens to the row's, one program for each kv head."""
    if is_mine & (head % GROUP == 0):
        kv_head, column = head // GROUP, tl.arange(0, BLOCK_D)
        place = key_sums + (tl.load(slots + row) * KV_HEADS + kv_head) * HEAD_DIM + column
        mask = column < HEAD_DIM
        total = tl.load(place, mask=mask & has_past, other=0.0)
        block_sums += (row * KV_HEADS + kv_head) * tl.num_programs(0) * HEAD_DIM
        total = _add_blocks(total, block_sums, tl.num_programs(0), HEAD_DIM, BLOCK_D)
        tl.store(place, total, mask=mask)


@triton.jit
def gate_kernel(
    output, past, chosen, gated, scores, key_sums, slots, block_sums, tokens,
    GROUP: tl.constexpr, TOTAL: tl.constexpr, BLOCK_H: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
    KEEP: tl.constexpr, FACTOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Scale one head of gated tokens where KEEP heads are ahead of it; bring its keys' sum up.

    Grid (blocks of BLOCK_S tokens, heads, rows).

    Args:
        output: [rows, tokens, TOTAL, VALUE_DIM], changed in place.
        scores: float32 [rows, tokens, TOTAL].
        key_sums: as in ``sum_kernel``, gets the new tokens added; or None.
    """
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = block * BLOCK_S + tl.arange(0, BLOCK_S)
    wait_for_inputs(PDL)
    flags, length = _gated_tokens(chosen, gated, past, row, token, tokens)
    if tl.max(flags.to(tl.int32), axis=0) > 0:
        other = tl.arange(0, BLOCK_H)
        start = scores + (row * tokens + token) * TOTAL
        mask = flags[:, None] & (other < TOTAL)[None, :]
        ranked = tl.load(start[:, None] + other[None, :], mask=mask, other=float("-inf"))
        ranked = tl.where(ranked == ranked, ranked, float("-inf"))
        own = tl.load(start + head, mask=flags, other=float("-inf"))
        own = tl.where(own == own, own, float("-inf"))[:, None]
        ahead = (ranked > own) | ((ranked == own) & (other < head)[None, :])
        is_suppressed = flags & (tl.sum(ahead.to(tl.int32), axis=1) >= KEEP)
        column = tl.arange(0, BLOCK_V)
        place = ((row * tokens + token) * TOTAL + head) * VALUE_DIM
        place = output + place[:, None] + column[None, :]
        mask = is_suppressed[:, None] & (column < VALUE_DIM)[None, :]
        value = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        factor = tl.full((1, 1), FACTOR, tl.float32)
        tl.store(place, scaled_by(value, factor).to(output.dtype.element_ty), mask=mask)
    if key_sums is not None:
        _bring_up_sums(
            key_sums, slots, block_sums, row, head, (block == 0) & (length >= 0), length > 0,
            GROUP, TOTAL // GROUP, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
