"""The Triton kernels of paged attention for several new tokens per row."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.launch import wait_for_inputs
from fxgraft.kernels.paged_attention.pages import LOG2_E, LOWEST, entries, rotated, scaled


@triton.jit
def _write(
    rows, cache, table, token, length, mask, page_stride, token_stride,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Store the entries [S, BLOCK] of new tokens behind the ``length`` that a row has."""
    column = tl.arange(0, BLOCK)
    place = entries(length + token, mask, table, page_stride, token_stride, PAGE)
    mask = mask[:, None] & (column < DIM)[None, :]
    tl.store(cache + place[:, None] + column[None, :], rows, mask=mask)


@triton.jit
def _write_values(
    start, cache, table, token, length, is_new, writes, page_stride, token_stride,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Copy the values [S] at ``start`` to the cache."""
    column = tl.arange(0, BLOCK)
    mask = is_new[:, None] & (column < DIM)[None, :]
    values = tl.load(start[:, None] + column[None, :], mask=mask, other=0.0)
    _write(values, cache, table, token, length, writes, page_stride, token_stride, DIM, BLOCK, PAGE)


@triton.jit
def _write_flags(chosen, cache, table, token, length, writes, PAGE: tl.constexpr):
    """Write which of a row's new tokens are chosen behind its past."""
    place = entries(length + token, writes, table, PAGE, 1, PAGE)
    tl.store(cache + place, tl.load(chosen + token, mask=writes, other=0), mask=writes)


@triton.jit
def _sum_chosen(keys, chosen, total, token, is_new, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Store the sum of the chosen ones of keys [S, BLOCK]."""
    column = tl.arange(0, BLOCK)
    counts = tl.load(chosen + token, mask=is_new, other=0) != 0
    found = tl.sum(tl.where(counts[:, None], keys.to(tl.float32), 0.0), axis=0)
    tl.store(total + column, found, mask=column < DIM)


@triton.jit
def write_kernel(
    query, key, value, key_cache, value_cache, table, past, cos, sin, rotated_query, rotated_key,
    chosen, chosen_cache, block_sums, query_row, query_head, query_token, key_row, key_head,
    key_token, value_row, value_head, value_token, key_page, key_cache_head, key_entry, value_page,
    value_cache_head, value_entry, table_row, angle_row, angle_token, tokens, heads, kv_heads,
    PAGE: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Rotate queries and keys, and write keys and values to the caches.

    Grid (blocks of BLOCK_S tokens, kv heads twice and, if queries rotate, query heads, rows).

    Args:
        rotated_query: [rows, tokens, heads, HEAD_DIM], or None if queries do not rotate.
        rotated_key: [rows, tokens, kv_heads, HEAD_DIM], or None if only the cache needs keys.
        chosen: uint8 [rows, tokens], for the next two, each of which may be None.
        chosen_cache: uint8 [blocks, PAGE], gets ``chosen`` too.
        block_sums: float32 [rows, kv_heads, blocks of tokens, HEAD_DIM], sums of chosen keys.
        *_row, *_head, *_token, *_page, *_entry: strides; those of cos and sin are ``angle_*``.
    """
    row, which = tl.program_id(2).to(tl.int64), tl.program_id(1)
    token = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    is_new = token < tokens
    table += row * table_row
    column = tl.arange(0, BLOCK_D)
    mask = is_new[:, None] & (column < HEAD_DIM)[None, :]
    angle = (row * angle_row + token * angle_token)[:, None]
    wait_for_inputs(PDL)
    length = tl.load(past + row)
    writes = is_new & (length >= 0)
    if which < kv_heads:
        start = value + row * value_row + which * value_head + token.to(tl.int64) * value_token
        _write_values(
            start, value_cache + which * value_cache_head, table, token, length, is_new, writes,
            value_page, value_entry, VALUE_DIM, BLOCK_V, PAGE,
        )  # fmt: skip
        if chosen_cache is not None:
            mine, flags = writes & (which == 0), chosen + row * tokens
            _write_flags(flags, chosen_cache, table, token, length, mine, PAGE)
    elif which < 2 * kv_heads:
        head = which - kv_heads
        start = key + row * key_row + head * key_head + token.to(tl.int64) * key_token
        keys = rotated(
            start[:, None], column[None, :], mask, cos, sin, angle, is_new[:, None],
            ROTARY, INTERLEAVED,
        )  # fmt: skip
        _write(
            keys, key_cache + head * key_cache_head, table, token, length, writes,
            key_page, key_entry, HEAD_DIM, BLOCK_D, PAGE,
        )  # fmt: skip
        if rotated_key is not None:
            place = ((row * tokens + token) * kv_heads + head) * HEAD_DIM
            tl.store(rotated_key + place[:, None] + column[None, :], keys, mask=mask)
        if block_sums is not None:
            of_block = ((row * kv_heads + head) * tl.num_programs(0) + tl.program_id(0)) * HEAD_DIM
            _sum_chosen(
                keys, chosen + row * tokens, block_sums + of_block, token, is_new,
                HEAD_DIM, BLOCK_D,
            )  # fmt: skip
    elif rotated_query is not None:
        head = which - 2 * kv_heads
        start = query + row * query_row + head * query_head + token.to(tl.int64) * query_token
        queries = rotated(
            start[:, None], column[None, :], mask, cos, sin, angle, is_new[:, None],
            ROTARY, INTERLEAVED,
        )  # fmt: skip
        place = ((row * tokens + token) * heads + head) * HEAD_DIM
        tl.store(rotated_query + place[:, None] + column[None, :], queries, mask=mask)


@triton.jit
def _attend(
    top, total, mixed, query, position, key_cache, value_cache, table, begin, end, key_page,
    key_entry, value_page, value_entry, scale,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Continue the online softmax of queries at ``position`` [M] over the tokens begin..end.

    Without MASKED every query sees all of them, and they are whole tiles.
    """
    column, value_column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        token = start + tl.arange(0, TILE)
        mask = token < end
        keys = entries(token, mask, table, key_page, key_entry, PAGE)
        key_mask = (column < HEAD_DIM)[:, None] & mask[None, :]
        key = tl.load(key_cache + keys[None, :] + column[:, None], mask=key_mask, other=0.0)
        values = entries(token, mask, table, value_page, value_entry, PAGE)
        value_mask = mask[:, None] & (value_column < VALUE_DIM)[None, :]
        value = tl.load(
            value_cache + values[:, None] + value_column[None, :], mask=value_mask, other=0.0
        )
        score = scaled(tl.dot(query, key, input_precision="ieee"), scale, SOFTCAP)
        if MASKED:
            visible = mask[None, :] & (token[None, :] <= position[:, None])
            if WINDOW > 0:
                visible = visible & (token[None, :] > position[:, None] - WINDOW)
            score = tl.where(visible, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        weight, decay = tl.exp2(score - higher[:, None]), tl.exp2(top - higher)
        total = total * decay + tl.sum(weight, axis=1)
        mixed = tl.dot(
            weight.to(value.dtype), value, mixed * decay[:, None], input_precision="ieee"
        )
        top = higher
    return top, total, mixed


@triton.jit
def prefill_kernel(
    query, key_cache, value_cache, table, past, sinks, output, query_row, query_head, query_token,
    key_page, key_cache_head, key_entry, value_page, value_cache_head, value_entry, table_row,
    tokens, scale,
    GROUP: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rotated queries of one head and row over caches that hold the new tokens too.

    Grid (blocks of queries, heads, rows); the blocks with most keys come first. Source: Dao,
    arXiv 2307.08691, algorithm 1.

    Args:
        output: [rows, tokens, heads, VALUE_DIM].
        *_row, *_head, *_token, *_page, *_entry: strides.
    """
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = head // GROUP
    table += row * table_row
    key_cache += kv_head * key_cache_head
    value_cache += kv_head * value_cache_head
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    token = first + tl.arange(0, BLOCK_M)
    column, value_column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    start = query + row * query_row + head * query_head + token.to(tl.int64) * query_token
    mask = (token < tokens)[:, None] & (column < HEAD_DIM)[None, :]
    wait_for_inputs(PDL)
    length = tl.load(past + row)
    queries = tl.load(start[:, None] + column[None, :], mask=mask, other=0.0)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if length >= 0:
        begin, full, end = 0, 0, length + tl.minimum(first + BLOCK_M, tokens)
        if WINDOW > 0:
            begin = tl.maximum(length + first + 1 - WINDOW, 0)
            # All queries of the block see the tokens from ``full`` to ``partly``.
            full = begin + tl.cdiv(tl.maximum(end - WINDOW - begin, 0), TILE) * TILE
            full = tl.minimum(full, end)
            top, total, mixed = _attend(
                top, total, mixed, queries, length + token, key_cache, value_cache, table,
                begin, full, key_page, key_entry, value_page, value_entry, scale,
                True, WINDOW, SOFTCAP, PAGE, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, TILE, STAGES,
            )  # fmt: skip
        partly = full + tl.maximum(length + first + 1 - full, 0) // TILE * TILE
        top, total, mixed = _attend(
            top, total, mixed, queries, length + token, key_cache, value_cache, table,
            full, partly, key_page, key_entry, value_page, value_entry, scale,
            False, WINDOW, SOFTCAP, PAGE, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, TILE, STAGES,
        )  # fmt: skip
        top, total, mixed = _attend(
            top, total, mixed, queries, length + token, key_cache, value_cache, table,
            partly, end, key_page, key_entry, value_page, value_entry, scale,
            True, WINDOW, SOFTCAP, PAGE, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, TILE, STAGES,
        )  # fmt: skip
        if sinks is not None:
            total += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2_E - top)
    total = tl.where(total > 0, total, 1.0)
    place = ((row * tokens + token) * tl.num_programs(1) + head) * VALUE_DIM
    mask = (token < tokens)[:, None] & (value_column < VALUE_DIM)[None, :]
    result = (mixed / total[:, None]).to(output.dtype.element_ty)
    tl.store(output + place[:, None] + value_column[None, :], result, mask=mask)
