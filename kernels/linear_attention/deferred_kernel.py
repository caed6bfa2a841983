"""Triton kernel of a decode step that writes the state back only when its ring is full."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.launch import prefetch, wait_for_inputs
from fxgraft.kernels.linear_attention.loads_kernel import (
    prefetch_state,
    state_columns,
    store_columns,
    value_of,
    weighted_query,
    written,
)


@triton.jit
def _scores(
    keys, sums, query, mixing, k, last, held, channel, number, in_w, query_head, mixing_head, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """How much each token of a ring counts for each query head of the group [G, R].

    Args:
        keys, sums: of the ring, pointers to its first token.
        k, last: [W], of the new token, which is the one behind the ``held`` first.
    """
    token, group = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_G)
    in_ring = (token < held)[:, None] & in_w[None, :]
    places = token[:, None] * WIDTH + tl.arange(0, k.shape[0])[None, :]
    ringed = tl.load(keys + places, mask=in_ring, other=0.0)
    since = tl.load(sums + places, mask=in_ring, other=0.0)
    ringed *= tl.exp(tl.where(in_ring, last[None, :] - since, 0.0))
    ringed = tl.where((token == held)[:, None], k[None, :], ringed)
    scores = tl.zeros((BLOCK_G, BLOCK_R), tl.float32)
    for j in tl.static_range(GROUP):
        q = weighted_query(
            query + j * query_head, mixing + j * mixing_head, channel, number, in_w, scale
        )
        found = tl.sum(q[None, :] * ringed, axis=1)
        scores = tl.where((group == j)[:, None], found[None, :], scores)
    return scores


@triton.jit
def _read(
    values, v, scores, memory, q, left, held, query, mixing, channel, number, in_w, in_v,
    query_head, mixing_head, scale,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What the query heads of a group read from the ring and the state behind it [G, V].

    Args:
        values: of the ring, pointers [V] to its first token.
        v: of the new token, which is the one behind the ``held`` first.
        scores: [G, R], as ``_scores`` says.
        memory, left: the state [W, V], and what is left of it since [W].
        q: [W], of the first head.
    """
    token, group = tl.arange(0, BLOCK_R), tl.arange(0, scores.shape[0])
    others = tl.load(
        values[None, :] + token[:, None] * VALUE_DIM,
        mask=(token < held)[:, None] & in_v[None, :], other=0.0,
    )  # fmt: skip
    others = tl.where((token == held)[:, None], v[None, :], others)
    reads = tl.sum(scores[:, :, None] * others[None, :, :], axis=1)
    for j in tl.static_range(GROUP):
        if GROUP > 1:
            q = weighted_query(
                query + j * query_head, mixing + j * mixing_head, channel, number, in_w, scale
            )
        read = tl.sum((q * left)[:, None] * memory, axis=0)
        reads += tl.where((group == j)[:, None], read[None, :], 0.0)
    return reads


@triton.jit
def _with_ring(
    memory, keys, sums, values, wide, column, last,
    WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """The state [W, V] with what the tokens of a full ring, but for the last, add to it."""
    in_w, in_v = wide < WIDTH, column < VALUE_DIM
    for i in range(RING - 1):
        grown = tl.load(keys + i * WIDTH + wide, mask=in_w, other=0.0)
        grown *= tl.exp(last - tl.load(sums + i * WIDTH + wide, mask=in_w, other=0.0))
        old = tl.load(values + i * VALUE_DIM + column, mask=in_v, other=0.0)
        memory += grown[:, None] * old[None, :]
    return memory


@triton.jit
def deferred_kernel(
    query, key, value, gate, mixing, pool, ring_keys, ring_sums, ring_values, origin, slots, past,
    output,
    query_row, query_head, key_row, key_head, value_row, value_head,
    gate_row, gate_head, gate_state, gate_channel, mixing_head, pool_slot, pool_slots, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_GROUP: tl.constexpr,
    STATES: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, RING: tl.constexpr,
    TEMPERATURE: tl.constexpr, FLOOR: tl.constexpr, SCALES_WRITES: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, LOOPS: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token of one row and state head, for BLOCK_V · LOOPS columns of its state.

    Args:
        ring_keys, ring_sums, ring_values, origin: of ``deferred.Ring``, contiguous.
        RING, BLOCK_R: tokens that the ring holds, and that as a power of 2; the others as in
            module ``decode_kernel``.
    """
    WIDTH: tl.constexpr = STATES * KEY_DIM
    pair = tl.program_id(0)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    start = tl.program_id(1) * BLOCK_V * LOOPS
    wide, column = tl.arange(0, BLOCK_W), start + tl.arange(0, BLOCK_V)
    in_w, channel = wide < WIDTH, wide % KEY_DIM
    number = tl.minimum(wide // KEY_DIM, STATES - 1)
    kv_head, pool = head // KEY_GROUP, pool + head * WIDTH * VALUE_DIM
    keys = key + row * key_row + kv_head * key_head + channel
    gates = gate + row * gate_row + head * gate_head + number * gate_state + channel * gate_channel
    if PREFETCH > 0:
        prefetch_state(
            pool, slots, row, pool_slot, pool_slots, wide, start, WIDTH, VALUE_DIM, PREFETCH, PDL
        )
        prefetch(keys, PDL)
        prefetch(gates, PDL)
    wait_for_inputs(PDL)
    slot, seen = tl.load(slots + row).to(tl.int64), tl.load(past + row)
    new_key = tl.load(keys, mask=in_w, other=0.0)
    new_gate = tl.load(gates, mask=in_w, other=0.0)
    is_active = (slot >= 0) & (seen >= 0)
    slot = tl.maximum(slot, 0)
    held = (tl.maximum(seen, 0) - tl.load(origin + slot)) % RING
    has_past = is_active & (seen > held)
    place = pool + slot * pool_slot + wide[:, None] * VALUE_DIM + column[None, :]
    ahead = state_columns(place, in_w & has_past, column < VALUE_DIM)
    kept = slot * HEADS + head
    keys, sums = ring_keys + kept * RING * WIDTH, ring_sums + kept * RING * WIDTH
    ringed = ring_values + kept * RING * VALUE_DIM
    k, decay = written(new_key, new_gate, None, 0, TEMPERATURE, FLOOR, SCALES_WRITES)
    before = tl.load(sums + (held - 1) * WIDTH + wide, mask=in_w & (held > 0), other=0.0)
    last = before + decay
    if start == 0:
        tl.store(keys + held * WIDTH + wide, k, mask=in_w & is_active)
        tl.store(sums + held * WIDTH + wide, last, mask=in_w & is_active)
    query += row * query_row + head * GROUP * query_head
    mixing += head * GROUP * mixing_head
    scores = _scores(
        keys, sums, query, mixing, k, last, held, channel, number, in_w, query_head, mixing_head,
        scale, GROUP, WIDTH, BLOCK_G, BLOCK_R,
    )  # fmt: skip
    left = tl.exp(last)
    q = weighted_query(query, mixing, channel, number, in_w, scale)
    group = tl.arange(0, BLOCK_G)
    for i in tl.range(LOOPS):
        memory, columns = ahead, column + i * BLOCK_V
        in_v = columns < VALUE_DIM
        if LOOPS > 1:
            following = (columns + BLOCK_V < VALUE_DIM) & (i + 1 < LOOPS)
            ahead = state_columns(place + (i + 1) * BLOCK_V, in_w & has_past, following)
        v = value_of(value + row * value_row + kv_head * value_head + columns, None, 0, in_v)
        tl.store(ringed + held * VALUE_DIM + columns, v, mask=in_v & is_active)
        reads = _read(
            ringed + columns, v, scores, memory, q, left, held, query, mixing, channel, number,
            in_w, in_v, query_head, mixing_head, scale, GROUP, VALUE_DIM, BLOCK_R,
        )  # fmt: skip
        reads = tl.where(is_active, reads, 0.0)
        targets = (row * HEADS * GROUP + head * GROUP + group)[:, None] * VALUE_DIM
        tl.store(
            output + targets + columns[None, :], reads.to(output.dtype.element_ty),
            mask=(group < GROUP)[:, None] & in_v[None, :],
        )  # fmt: skip
        if held == RING - 1:
            memory = memory * left[:, None] + k[:, None] * v[None, :]
            memory = _with_ring(
                memory, keys, sums, ringed, wide, columns, last, WIDTH, VALUE_DIM, RING
            )
            store_columns(place + i * BLOCK_V, memory, in_w & is_active, in_v)
