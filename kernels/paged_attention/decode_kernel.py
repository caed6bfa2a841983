"""The Triton kernel of paged attention for one new token per row.

The tokens that a row has are split among programs, each of which attends to its part for all query
heads of one kv head; the last of them to finish adds the parts up. Source: Dao et al.,
"Flash-Decoding for long-context inference", 2023.
"""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.launch import only_wait_for_inputs, prefetch, start_next
from fxgraft.kernels.paged_attention.decode_loops import (
    by_dots,
    by_products,
    lanes_of,
    new_logits,
    with_new,
)
from fxgraft.kernels.paged_attention.gating import (
    count_key,
    gate_by_sums,
    gated_part,
    is_gated,
    prefetch_sums,
    scale_row,
)
from fxgraft.kernels.paged_attention.pages import entries, rotated, turned, unrotated
from fxgraft.kernels.paged_attention.splits import (
    add_parts,
    finish,
    leave_part,
    part_of,
    store_zeros,
)


@triton.jit
def _prefetch_tokens(
    cache, table, begin, end, page_stride, token_stride, blocks,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Bring the first TOKENS entries of a part into L2, before the table is known to be valid."""
    LINE: tl.constexpr = 1024 // cache.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (BLOCK + LINE - 1) // LINE
    token = tl.minimum(begin + tl.arange(0, TOKENS), end - 1)
    page = tl.load(table + token // PAGE, cache_modifier=".cg")
    page = tl.minimum(tl.maximum(page, 0), blocks - 1).to(tl.int64)
    start = cache + page * page_stride + (token % PAGE) * token_stride
    column = tl.minimum(tl.arange(0, LINES) * LINE, DIM - 1)
    prefetch(start[:, None] + column[None, :], PDL)


@triton.jit
def _prefetch_part(
    key_cache, value_cache, table, past, split, pages, blocks,
    key_page, key_token, value_page, value_token,
    WINDOW: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, LONGEST: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Bring the beginning of a split's part into L2.

    Length and table may still be about to be written: any length that fits and any block will do.
    """
    guess = tl.load(past, cache_modifier=".cg")
    guess = tl.minimum(tl.maximum(guess, 0), pages * PAGE)
    begin, end, _ = part_of(guess, split, WINDOW, SPLITS, LEAST, LONGEST)
    if begin < end:
        _prefetch_tokens(
            key_cache, table, begin, end, key_page, key_token, blocks,
            HEAD_DIM, BLOCK_D, PAGE, PREFETCH, PDL,
        )  # fmt: skip
        _prefetch_tokens(
            value_cache, table, begin, end, value_page, value_token, blocks,
            VALUE_DIM, BLOCK_V, PAGE, PREFETCH, PDL,
        )  # fmt: skip


@triton.jit
def _new_token(
    key, value, key_cache, value_cache, table, length, cos, sin, angle, is_mine, key_page,
    key_token, value_page, value_token,
    PAGE: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The new token's rotated key [1, D] and value [D], written to the caches; 0 if not mine."""
    column, value_column = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_V)
    mask = (column < HEAD_DIM) & is_mine
    new_key = rotated(
        key + tl.zeros((1, 1), tl.int32), column, mask, cos, sin, angle, angle >= 0,
        ROTARY, INTERLEAVED,
    )  # fmt: skip
    value_mask = (value_column < VALUE_DIM) & is_mine
    new_value = tl.load(value + value_column, mask=value_mask, other=0.0)
    place = entries(length, is_mine, table, key_page, key_token, PAGE)
    tl.store(key_cache + place + column, new_key, mask=mask)
    place = entries(length, is_mine, table, value_page, value_token, PAGE)
    tl.store(value_cache + place + value_column, new_value, mask=value_mask)
    return new_key, new_value.to(tl.float32)


@triton.jit
def _load_queries(
    query, query_head, cos, sin, angle_start,
    GROUP: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The queries [G, D] of a kv head with what they turn by, as ``unrotated`` returns them."""
    group, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    # For each row, so that a thread loads neighbours as it does of the queries.
    angle = tl.zeros((BLOCK_G, 1), tl.int64) + angle_start
    return unrotated(
        query + (group * query_head)[:, None], column[None, :],
        (group < GROUP)[:, None] & (column < HEAD_DIM)[None, :], cos, sin, angle, angle >= 0,
        ROTARY, INTERLEAVED,
    )  # fmt: skip


@triton.jit
def _attend_part(
    loaded, key, value, key_cache, value_cache, chosen_cache, table, cos, sin, length, split, begin,
    end, angle_start, key_page, key_token, value_page, value_token, scale,
    GROUP: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split's part; the first one also has the new token, which it writes to the caches.

    Args:
        loaded: the queries, as ``_load_queries`` returns them.
        key, value: of the row and kv head.
        angle_start: where the row's angles begin in cos and sin.

    Returns:
        The new key [1, D], then what ``by_dots`` returns.
    """
    column = tl.arange(0, BLOCK_D)
    if BLOCK_G == 1:
        token = begin + tl.arange(0, TILE)
    else:
        token = begin + lanes_of(TILE, LANES, PAGE, WINDOW)[0]
    page = tl.load(table + token // PAGE, mask=token < end, other=0)
    queries = turned(loaded, column[None, :], ROTARY, INTERLEAVED)
    angle = tl.zeros((1, 1), tl.int64) + angle_start
    new_key, new_value = _new_token(
        key, value, key_cache, value_cache, table, length, cos, sin, angle, split == 0,
        key_page, key_token, value_page, value_token,
        PAGE, ROTARY, INTERLEAVED, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    if BLOCK_G == 1:
        top, total, mixed, looked = by_products(
            queries, key_cache, value_cache, chosen_cache, table, page, begin, end,
            key_page, key_token, value_page, value_token, scale,
            SOFTCAP, PAGE, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, TILE, STAGES,
        )  # fmt: skip
    else:
        top, total, mixed, looked = by_dots(
            queries, key_cache, value_cache, chosen_cache, table, page, begin, end,
            key_page, key_token, value_page, value_token, scale,
            SOFTCAP, PAGE, WINDOW, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, TILE, LANES, STAGES,
        )  # fmt: skip
    start_next(PDL)
    # Here, because the loop's first loads would wait for it.
    if split == 0:
        score = new_logits(queries, new_key, scale, SOFTCAP)
        top, total, mixed, looked = with_new(top, total, mixed, looked, score, new_value)
    return new_key, top, total, mixed, looked


@triton.jit
def _store_part(
    top, total, mixed, looked, partial, statistics, arrived, sinks, scores, output, pair, split,
    parts, head,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_V: tl.constexpr, MOST: tl.constexpr, CHUNK: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Leave one part, or store the outputs if no other is to come; whether they are there now."""
    is_last = parts == 1
    if is_last:
        finish(
            top, total, mixed, looked, sinks, scores, output, head,
            GROUP, VALUE_DIM, BLOCK_G, BLOCK_V,
        )  # fmt: skip
    else:
        is_last = leave_part(
            top, total, mixed, looked, partial, statistics, arrived, pair, split, parts,
            GROUP, BLOCK_G, BLOCK_V, MOST, FIELDS,
        )  # fmt: skip
        if is_last:
            add_parts(
                partial, statistics, pair, parts, sinks, scores, output, head,
                GROUP, VALUE_DIM, HEADS, BLOCK_V, MOST, CHUNK, FIELDS,
            )  # fmt: skip
            tl.store(arrived + pair, 0)
    return is_last


@triton.jit
def _note_chosen(chosen, chosen_cache, table, row, length, is_mine, PAGE: tl.constexpr):
    """Write behind a row's past whether its new token is chosen."""
    place = entries(length, is_mine, table, PAGE, 1, PAGE)
    tl.store(chosen_cache + place, tl.load(chosen + row), mask=is_mine)


@triton.jit
def _run_part(
    loaded, key, value, key_cache, value_cache, table, cos, sin, sinks, output, partial, statistics,
    arrived, chosen, gated, key_sums, slots, chosen_cache, scores, gate, length, split, begin, end,
    parts, kv_head, row, angle_start, key_page, key_token, value_page, value_token, scale,
    GROUP: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
    STAGES: tl.constexpr, CHUNK: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_H: tl.constexpr,
    SCORE_CHUNK: tl.constexpr, KEEP: tl.constexpr, FACTOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attend to one split's part, suppress heads, and store what comes out.

    Args:
        loaded: the queries, as ``_load_queries`` returns them.
        key, value, output: of the row and kv head, or its first head.
        gate: factors of the outputs [G], or None.
    """
    head, pair = kv_head * GROUP, row * KV_HEADS + kv_head
    new_key, top, total, mixed, looked = _attend_part(
        loaded, key, value, key_cache, value_cache, chosen_cache, table, cos, sin, length, split,
        begin, end, angle_start, key_page, key_token, value_page, value_token, scale,
        GROUP, PAGE, WINDOW, SOFTCAP, ROTARY, INTERLEAVED, HEAD_DIM, VALUE_DIM, BLOCK_G, BLOCK_D,
        BLOCK_V, TILE, LANES, STAGES, PDL,
    )  # fmt: skip
    if gate is not None:
        top, total, mixed = gated_part(top, total, mixed, gate)
        count_key(
            new_key, key_sums, slots, chosen, row, kv_head, KV_HEADS, length, split == 0,
            HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    FIELDS: tl.constexpr = 2 if scores is None else 3
    row_scores = None
    if scores is not None:
        row_scores = scores + row * KV_HEADS * GROUP
    is_last = _store_part(
        top, total, mixed, looked, partial, statistics, arrived, sinks, row_scores, output, pair,
        split, parts, head, GROUP, VALUE_DIM, HEADS, BLOCK_G, BLOCK_V, MOST, CHUNK, FIELDS,
    )  # fmt: skip
    if scores is not None:
        is_first = (split == 0) & (kv_head == 0)
        _note_chosen(chosen, chosen_cache, table, row, length, is_first, PAGE)
        if is_last & is_gated(chosen, gated, row):
            scale_row(
                row_scores, arrived + tl.num_programs(2) * KV_HEADS + row,
                output - head * VALUE_DIM, KV_HEADS * GROUP, BLOCK_H, KV_HEADS, VALUE_DIM,
                SCORE_CHUNK, KEEP, FACTOR,
            )  # fmt: skip


@triton.jit
def _skip_row(
    key, value, key_cache, value_cache, table, cos, sin, output, chosen, key_sums, slots, length,
    kv_head, row, angle_start, key_page, key_token, value_page, value_token,
    GROUP: tl.constexpr, PAGE: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    """Attend to nothing: zeros, and the new key and value, which later tokens may need."""
    angle = tl.zeros((1, 1), tl.int64) + angle_start
    new_key, _ = _new_token(
        key, value, key_cache, value_cache, table, length, cos, sin, angle, length >= 0,
        key_page, key_token, value_page, value_token,
        PAGE, ROTARY, INTERLEAVED, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    store_zeros(output, GROUP, VALUE_DIM, BLOCK_G, BLOCK_V)
    count_key(
        new_key, key_sums, slots, chosen, row, kv_head, KV_HEADS, length, length >= 0,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _serve_part(
    query, loaded, key, value, key_cache, value_cache, table, cos, sin, sinks, output, partial,
    statistics, arrived, chosen, gated, key_sums, slots, chosen_cache, scores, length, split, begin,
    end, parts, kv_head, row, query_head, angle_start, key_page, key_token, value_page, value_token,
    scale,
    GROUP: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
    STAGES: tl.constexpr, CHUNK: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_H: tl.constexpr,
    SCORE_CHUNK: tl.constexpr, KEEP: tl.constexpr, FACTOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split's part, unless its heads are all suppressed with a factor of 0.

    Args:
        query: of the row's first head.
        loaded: the queries, as ``_load_queries`` returns them.
        key, value, output: of the kv head, or its first head.
    """
    head = kv_head * GROUP
    gate = None
    if key_sums is not None:
        gate = gate_by_sums(
            query, key_sums, slots, chosen, gated, row, head, length, KV_HEADS, cos, sin,
            angle_start, query_head, scale, GROUP, BLOCK_G, KV_HEADS * GROUP, BLOCK_H, HEAD_DIM,
            SCORE_CHUNK, ROTARY, INTERLEAVED, KEEP, FACTOR,
        )  # fmt: skip
    if gate is None or FACTOR != 0 or tl.max(gate, axis=0) > 0:
        _run_part(
            loaded, key, value, key_cache, value_cache, table, cos, sin, sinks, output, partial,
            statistics, arrived, chosen, gated, key_sums, slots, chosen_cache, scores, gate, length,
            split, begin, end, parts, kv_head, row, angle_start, key_page, key_token, value_page,
            value_token, scale,
            GROUP, PAGE, WINDOW, SOFTCAP, ROTARY, INTERLEAVED, HEAD_DIM, VALUE_DIM, HEADS, BLOCK_G,
            BLOCK_D, BLOCK_V, MOST, TILE, LANES, STAGES, CHUNK, KV_HEADS, BLOCK_H, SCORE_CHUNK,
            KEEP, FACTOR, PDL,
        )  # fmt: skip
    elif split == 0:
        _skip_row(
            key, value, key_cache, value_cache, table, cos, sin, output, chosen, key_sums, slots,
            length, kv_head, row, angle_start, key_page, key_token, value_page, value_token,
            GROUP, PAGE, ROTARY, INTERLEAVED, HEAD_DIM, VALUE_DIM, BLOCK_G, BLOCK_D, BLOCK_V,
            KV_HEADS,
        )  # fmt: skip


@triton.jit
def decode_kernel(
    query, key, value, key_cache, value_cache, table, past, cos, sin, sinks, output, partial,
    statistics, arrived, chosen, gated, key_sums, slots, chosen_cache, scores, query_row,
    query_head, key_row, key_head, value_row, value_head, key_page, key_cache_head, key_token,
    value_page, value_cache_head, value_token, table_row, angle_row, blocks, pages, scale,
    GROUP: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, SPLITS: tl.constexpr, MOST: tl.constexpr, LEAST: tl.constexpr,
    LONGEST: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
    CHUNK: tl.constexpr, PREFETCH: tl.constexpr, KV_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr, SCORE_CHUNK: tl.constexpr, KEEP: tl.constexpr, FACTOR: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One split of one kv head of one row; grid (MOST, kv heads, rows).

    With ``key_sums`` the head outputs are gated by the sums of logits, with ``chosen_cache`` by
    the shares of attention, as the op says; with neither, nothing of that is compiled.

    Args:
        output: [rows, heads, VALUE_DIM].
        partial, statistics: float32, for each row, kv head, split and query head BLOCK_V sums, and
            the largest logit, sum of weights and, for shares, that of the chosen tokens.
        arrived: a counter of 0 for each row and kv head, then one for each row.
        chosen, gated: uint8 [rows].
        key_sums: float32 [slots, KV_HEADS, HEAD_DIM].
        chosen_cache: uint8 [blocks, PAGE].
        scores: float32 [rows, heads], written with ``chosen_cache`` only.
        *_row, *_head, *_page, *_token: strides; ``angle_row`` is that of cos and sin.
        blocks, pages: of the caches, and of the table.
        HEADS, BLOCK_G: query heads of a kv head, as a power of 2 and as the tensor cores take them.
        SPLITS, LEAST, LONGEST: how rows are split, as ``part_of`` says, into at most MOST parts.
        TILE: tokens of an iteration.
        LANES: softmaxes of a program, as ``by_dots`` says.
        CHUNK: parts that are read at once when they are added.
        PREFETCH: tokens to ask for before the inputs are ready, a power of 2.
        BLOCK_H, SCORE_CHUNK: query heads, and channels of them scored at once, powers of 2.
    """
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pair = row * tl.num_programs(1) + kv_head
    table += row * table_row
    key_cache += kv_head * key_cache_head
    value_cache += kv_head * value_cache_head
    output += pair * GROUP * VALUE_DIM
    if PDL and PREFETCH > 0:
        _prefetch_part(
            key_cache, value_cache, table, past + row, split, pages, blocks,
            key_page, key_token, value_page, value_token, WINDOW, SPLITS, LEAST, LONGEST,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, PAGE, PREFETCH, PDL,
        )  # fmt: skip
    if PDL and key_sums is not None:
        prefetch_sums(key_sums, slots, row, kv_head, KV_HEADS, HEAD_DIM, BLOCK_D, PDL)
    only_wait_for_inputs(PDL)
    length = tl.load(past + row)
    query += row * query_row
    # Before the length is here, which says what else to load.
    loaded = _load_queries(
        query + kv_head * GROUP * query_head, query_head, cos, sin, row * angle_row,
        GROUP, ROTARY, INTERLEAVED, HEAD_DIM, BLOCK_G, BLOCK_D,
    )  # fmt: skip
    begin, end, parts = part_of(length, split, WINDOW, SPLITS, LEAST, LONGEST)
    if (length < 0) & (split == 0):
        store_zeros(output, GROUP, VALUE_DIM, BLOCK_G, BLOCK_V)
    if (length >= 0) & (split < parts):
        _serve_part(
            query, loaded, key + row * key_row + kv_head * key_head,
            value + row * value_row + kv_head * value_head, key_cache, value_cache, table, cos, sin,
            sinks, output, partial, statistics, arrived, chosen, gated, key_sums, slots,
            chosen_cache, scores, length, split, begin, end, parts, kv_head, row, query_head,
            row * angle_row, key_page, key_token, value_page, value_token, scale,
            GROUP, PAGE, WINDOW, SOFTCAP, ROTARY, INTERLEAVED, HEAD_DIM, VALUE_DIM, HEADS, BLOCK_G,
            BLOCK_D, BLOCK_V, MOST, TILE, LANES, STAGES, CHUNK, KV_HEADS, BLOCK_H, SCORE_CHUNK,
            KEEP, FACTOR, PDL,
        )  # fmt: skip
