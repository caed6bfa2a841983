"""Triton kernel of a decode step that writes the state back only when its ring is full."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.launch import wait_for_inputs
from fxgraft.kernels.linear_attention.loads_kernel import written


@triton.jit
def _ring(
    keys, sums, values, held, wide, column, last,
    WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Keys [R, W], decayed until now, and values [R, V] of the first ``held`` tokens of a ring."""
    token = tl.arange(0, BLOCK_R)
    in_ring = (token < held)[:, None] & (wide < WIDTH)[None, :]
    places = token[:, None] * WIDTH + wide[None, :]
    ringed = tl.load(keys + places, mask=in_ring, other=0.0)
    since = tl.load(sums + places, mask=in_ring, other=0.0)
    ringed *= tl.exp(tl.where(in_ring, last[None, :] - since, 0.0))
    in_values = (token < held)[:, None] & (column < VALUE_DIM)[None, :]
    places = values + token[:, None] * VALUE_DIM + column[None, :]
    return ringed, tl.load(places, mask=in_values, other=0.0)


@triton.jit
def _sum_of_ring(
    keys, sums, values, wide, column, last,
    WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """What the tokens of a full ring, but for the last, add to the state [W, V]."""
    in_w, in_v = wide < WIDTH, column < VALUE_DIM
    total = tl.zeros((wide.shape[0], column.shape[0]), tl.float32)
    for i in range(RING - 1):
        grown = tl.load(keys + i * WIDTH + wide, mask=in_w, other=0.0)
        grown *= tl.exp(last - tl.load(sums + i * WIDTH + wide, mask=in_w, other=0.0))
        old = tl.load(values + i * VALUE_DIM + column, mask=in_v, other=0.0)
        total += grown[:, None] * old[None, :]
    return total


@triton.jit
def deferred_kernel(
    query, key, value, gate, mixing, pool, ring_keys, ring_sums, ring_values, origin, slots, past,
    output,
    query_row, query_head, key_row, key_head, value_row, value_head,
    gate_row, gate_head, gate_state, gate_channel, mixing_head, pool_slot, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_GROUP: tl.constexpr,
    STATES: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, RING: tl.constexpr,
    TEMPERATURE: tl.constexpr, FLOOR: tl.constexpr, SCALES_WRITES: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token of one row and state head, for BLOCK_V columns of its state.

    Args:
        ring_keys, ring_sums, ring_values, origin: of ``deferred.Ring``, contiguous.
        RING, BLOCK_R: tokens that the ring holds, and that as a power of 2; the others as in
            module ``step_kernel``.
    """
    WIDTH: tl.constexpr = STATES * KEY_DIM
    pair = tl.program_id(0)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    wide = tl.arange(0, BLOCK_W)
    in_w = wide < WIDTH
    channel, number = wide % KEY_DIM, wide // KEY_DIM
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = column < VALUE_DIM
    wait_for_inputs(PDL)
    slot, seen = tl.load(slots + row).to(tl.int64), tl.load(past + row)
    is_active = (slot >= 0) & (seen >= 0)
    slot = tl.maximum(slot, 0)
    held = (tl.maximum(seen, 0) - tl.load(origin + slot)) % RING
    kept = slot * HEADS + head
    keys, sums = ring_keys + kept * RING * WIDTH, ring_sums + kept * RING * WIDTH
    values = ring_values + kept * RING * VALUE_DIM
    cells = wide[:, None] * VALUE_DIM + column[None, :]
    place = pool + slot * pool_slot + head * WIDTH * VALUE_DIM + cells
    in_state = in_w[:, None] & in_v[None, :] & is_active
    memory = tl.load(place, mask=in_state & (seen > held), other=0.0).to(tl.float32)

    kv_head = head // KEY_GROUP
    gates = gate + row * gate_row + head * gate_head + number * gate_state + channel * gate_channel
    k, v, decay = written(
        key + row * key_row + kv_head * key_head + channel,
        value + row * value_row + kv_head * value_head + column,
        gates, None, 0, in_w, in_v, TEMPERATURE, FLOOR, SCALES_WRITES,
    )  # fmt: skip
    before = tl.load(sums + (held - 1) * WIDTH + wide, mask=in_w & (held > 0), other=0.0)
    last = before + decay
    if tl.program_id(1) == 0:
        tl.store(keys + held * WIDTH + wide, k, mask=in_w & is_active)
        tl.store(sums + held * WIDTH + wide, last, mask=in_w & is_active)
    tl.store(values + held * VALUE_DIM + column, v, mask=in_v & is_active)

    ringed, others = _ring(keys, sums, values, held, wide, column, last, WIDTH, VALUE_DIM, BLOCK_R)
    for j in range(GROUP):
        index = head * GROUP + j
        q = tl.load(query + row * query_row + index * query_head + channel, mask=in_w, other=0.0)
        weight = tl.load(mixing + index * mixing_head + number, mask=in_w, other=0.0)
        q = q.to(tl.float32) * scale * weight.to(tl.float32)
        read = tl.sum((q * tl.exp(last))[:, None] * memory, axis=0) + tl.sum(q * k, axis=0) * v
        scores = tl.sum(q[None, :] * ringed, axis=1)
        read += tl.sum(scores[:, None] * others, axis=0)
        read = tl.where(is_active, read, 0.0)
        target = output + (row * HEADS * GROUP + index) * VALUE_DIM + column
        tl.store(target, read.to(output.dtype.element_ty), mask=in_v)
    if held == RING - 1:
        memory = memory * tl.exp(last)[:, None] + k[:, None] * v[None, :]
        memory += _sum_of_ring(keys, sums, values, wide, column, last, WIDTH, VALUE_DIM, RING)
        tl.store(place, memory.to(pool.dtype.element_ty), mask=in_state)
