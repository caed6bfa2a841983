"""Triton kernel of ``linear_attention`` for one token per row: each state read and written once.

A program takes BLOCK_V · LOOPS columns of a head's states, BLOCK_V at a time, and has loaded the
next ones before it needs them. What belongs to rows of the states (gate, key, query) it computes
once. Its first columns are asked for before the kernels before it have ended: which slot they lie
in is a guess then, which only decides what is brought into L2.

Where several programs share a head, the last of them to arrive normalises the head's output. The
states are stored behind the arrival, which would wait for them.
"""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.launch import prefetch, wait_for_inputs
from fxgraft.kernels.linear_attention.gate_kernel import loss, once
from fxgraft.kernels.linear_attention.loads_kernel import (
    prefetch_state,
    slot_of,
    state_columns,
    store_columns,
    value_of,
    weighted_query,
    written,
)


@triton.jit
def decode_kernel(
    query, key, value, gate, mixing, norm_weight, mask, before, after, slots, past,
    output, scratch, arrived,
    query_row, query_head, key_row, key_head, value_row, value_head,
    gate_row, gate_head, gate_state, gate_channel,
    mixing_head, norm_head, mask_row, before_slot, after_slot, before_slots, scale, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_GROUP: tl.constexpr,
    STATES: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    TEMPERATURE: tl.constexpr, FLOOR: tl.constexpr, SCALES_WRITES: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, LOOPS: tl.constexpr, BLOCK_G: tl.constexpr,
    ALL_V: tl.constexpr, TILES: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token of one row and state head, for BLOCK_V · LOOPS columns of its states.

    Args:
        before_slots: how many slots ``before`` has.
        BLOCK_G: GROUP as a power of 2.
        PREFETCH: columns that are asked for ahead; the others as in module ``step_kernel``.
    """
    WIDTH: tl.constexpr = STATES * KEY_DIM
    pair = tl.program_id(0)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    start = tl.program_id(1) * BLOCK_V * LOOPS
    wide, column = tl.arange(0, BLOCK_W), start + tl.arange(0, BLOCK_V)
    in_w, channel = wide < WIDTH, wide % KEY_DIM
    number = tl.minimum(wide // KEY_DIM, STATES - 1)
    of_head = head * WIDTH * VALUE_DIM
    kv_head = head // KEY_GROUP
    keys = key + row * key_row + kv_head * key_head + channel
    gates = gate + row * gate_row + head * gate_head + number * gate_state + channel * gate_channel
    query += row * query_row + head * GROUP * query_head
    mixing += head * GROUP * mixing_head
    values = value + row * value_row + kv_head * value_head
    if PREFETCH > 0:
        _ask_ahead(
            before, keys, gates, query + channel, values + tl.minimum(column, VALUE_DIM - 1),
            of_head, slots, row, before_slot, before_slots, wide, start,
            WIDTH, VALUE_DIM, PREFETCH, PDL,
        )  # fmt: skip
    wait_for_inputs(PDL)
    slot, is_active, has_past = slot_of(slots, past, row)
    # All loads before what needs them: each takes as long as the rest of the program.
    new_key = tl.load(keys, mask=in_w, other=0.0)
    new_gate = tl.load(gates, mask=in_w, other=0.0)
    new_query = tl.load(query + channel, mask=in_w, other=0.0)
    weight = tl.load(mixing + number, mask=in_w, other=0.0)
    cells = of_head + wide[:, None] * VALUE_DIM + column[None, :]
    source, target = cells, after + slot * after_slot + cells
    ahead = tl.zeros((BLOCK_W, BLOCK_V), tl.float32)
    if before is not None:
        source = before + slot * before_slot + cells
        ahead = state_columns(source, in_w & has_past, column < VALUE_DIM)
    if mask is not None:
        mask += row * mask_row
    k, decay = written(new_key, new_gate, mask, 0, TEMPERATURE, FLOOR, SCALES_WRITES)
    lost = once(loss(-decay))
    q = new_query.to(tl.float32) * (scale * weight.to(tl.float32))
    reads = tl.zeros((BLOCK_G * LOOPS, BLOCK_V), tl.float32)
    memory = ahead
    for i in tl.range(LOOPS):
        memory, columns = ahead, column + i * BLOCK_V
        v = value_of(values + columns, mask, 0, columns < VALUE_DIM)
        if before is not None and LOOPS > 1:
            following = (columns + BLOCK_V < VALUE_DIM) & (i + 1 < LOOPS)
            ahead = state_columns(source + (i + 1) * BLOCK_V, in_w & has_past, following)
        # As in the reference: what the decay lacks to 1 is exact.
        memory -= memory * lost[:, None]
        memory += k[:, None] * v[None, :]
        reads = _read(
            reads, memory, q, query, mixing, channel, number, in_w, query_head, mixing_head, scale,
            i, GROUP, LOOPS,
        )  # fmt: skip
        if LOOPS > 1:
            store_columns(target + i * BLOCK_V, memory, in_w & is_active, columns < VALUE_DIM)
    reads = tl.where(is_active, tl.reshape(reads, (BLOCK_G, LOOPS * BLOCK_V)), 0.0)
    index = (row * HEADS + head) * GROUP
    weights = norm_weight
    if norm_weight is not None:
        weights += head * GROUP * norm_head
    if arrived is not None:
        arrived += pair
    is_last = _leave(
        output, scratch, arrived, reads, weights, index, start, norm_head, eps,
        GROUP, VALUE_DIM, TILES,
    )  # fmt: skip
    if LOOPS == 1:
        store_columns(target, memory, in_w & is_active, column < VALUE_DIM)
    if norm_weight is not None and TILES > 1:
        _normalize(
            scratch, output, weights, arrived, is_last, index, norm_head, eps,
            GROUP, VALUE_DIM, BLOCK_G, ALL_V,
        )  # fmt: skip


@triton.jit
def _ask_ahead(
    before, keys, gates, queries, values, of_head, slots, row, before_slot, before_slots, wide,
    start,
    WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Bring into L2 what the program loads first; keys, gates, queries and values are pointers."""
    if before is not None:
        prefetch_state(
            before + of_head, slots, row, before_slot, before_slots, wide, start,
            WIDTH, VALUE_DIM, COLUMNS, PDL,
        )  # fmt: skip
    prefetch(keys, PDL)
    prefetch(gates, PDL)
    prefetch(queries, PDL)
    prefetch(values, PDL)


@triton.jit
def _leave(
    output, scratch, arrived, reads, weights, index, start, norm_head, eps,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Store outputs, or in ``scratch`` columns to be normalised; whether all of a head are there.

    Args:
        arrived: the head's counter; the others as in ``store_outputs``.
    """
    is_last = False
    if weights is not None and TILES > 1:
        store_outputs(scratch, reads, None, index, start, norm_head, eps, GROUP, VALUE_DIM)
        # The counter's atomic orders one thread's writes; the barrier those of all before it.
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == TILES - 1
    else:
        store_outputs(output, reads, weights, index, start, norm_head, eps, GROUP, VALUE_DIM)
    return is_last


@triton.jit
def _read(
    reads, memory, q, query, mixing, channel, number, in_w, query_head, mixing_head, scale, i,
    GROUP: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """``reads`` [G · LOOPS, V] with what the query heads of a group read from columns ``i``.

    Args:
        memory: [W, V].
        q: [W], of the first head.
        query, mixing: as in ``weighted_query``, of the first head.
    """
    place = tl.arange(0, reads.shape[0])
    for j in tl.static_range(GROUP):
        if j > 0:
            q = weighted_query(
                query + j * query_head, mixing + j * mixing_head, channel, number, in_w, scale
            )
        read = tl.sum(q[:, None] * memory, axis=0)
        reads = tl.where((place == j * LOOPS + i)[:, None], read[None, :], reads)
    return reads


@triton.jit
def store_outputs(
    output, reads, weights, index, start, norm_head, eps,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Store what the query heads of a group read [G, V], columns from ``start`` on.

    Args:
        weights: of the norm, for the first head; None for no norm. Then columns are all.
        index: number of the first head's output.
    """
    group, column = tl.arange(0, reads.shape[0]), start + tl.arange(0, reads.shape[1])
    inside = (group < GROUP)[:, None] & (column < VALUE_DIM)[None, :]
    if weights is not None:
        factor = tl.rsqrt(tl.sum(reads * reads, axis=1) / VALUE_DIM + eps)
        gain = tl.load(
            weights + group[:, None] * norm_head + column[None, :], mask=inside, other=0.0
        )
        reads = reads * factor[:, None] * gain.to(tl.float32)
    places = (index + group)[:, None] * VALUE_DIM + column[None, :]
    tl.store(output + places, reads.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _normalize(
    scratch, output, weights, arrived, is_last, index, norm_head, eps,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_G: tl.constexpr, ALL_V: tl.constexpr,
):  # fmt: skip
    """Normalise what the programs of a head have left in ``scratch``, if this is the last one."""
    if is_last:
        group, column = tl.arange(0, BLOCK_G), tl.arange(0, ALL_V)
        inside = (group < GROUP)[:, None] & (column < VALUE_DIM)[None, :]
        places = (index + group)[:, None] * VALUE_DIM + column[None, :]
        # Other programs wrote it: read it from L2, where their writes are.
        reads = tl.load(scratch + places, mask=inside, other=0.0, cache_modifier=".cg")
        store_outputs(output, reads, weights, index, 0, norm_head, eps, GROUP, VALUE_DIM)
        tl.store(arrived, 0)
