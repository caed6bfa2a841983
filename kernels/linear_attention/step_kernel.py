"""Recurrent Triton kernel of ``linear_attention``: few tokens, states read and written once.

For one token per row ``decode_kernel`` is faster.

A head with N states of Dk × Dv is one matrix of N · Dk rows, of which a program holds a few
columns in registers while it runs over the tokens. Everything that acts on a token is done on
the way: gate, write factor, mixing, query heads of the group, and the norm of the output, by the
last program of a head to arrive where several share one.

Arguments of the kernels:

* ``query``, ``key``, ``value``, ``gate``, ``mixing``, ``norm_weight``, ``mask``: of the op, or
  None; the last dimension is contiguous, but for the gate's, which may be broadcast (stride 0).
* ``bounds``: cu_seqlens, or None: then each row has ``length`` tokens.
* ``before``, ``after``: [slots, HEADS, STATES, KEY_DIM, VALUE_DIM] that states are read from (or
  None) and written to; both may be the same.
* ``slots``, ``past``: as in ``loads_kernel.slot_of``.
* ``output``: [rows, tokens, HEADS · GROUP, VALUE_DIM].
* ``scratch``: float32 like the output, where a norm needs several programs' columns.
* ``arrived``: a counter of 0 for each row and head, used together with ``scratch``.
* ``*_row``, ``*_token``, ``*_head``, ``*_state``, ``*_channel``, ``*_slot``: strides.
* ``KEY_GROUP``: state heads that share a key head.
* ``BLOCK_W``, ``ALL_V``: STATES · KEY_DIM and VALUE_DIM as powers of 2.
* ``TILES``: programs that share a head.
"""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.launch import wait_for_inputs
from fxgraft.kernels.linear_attention.gate_kernel import loss, once
from fxgraft.kernels.linear_attention.loads_kernel import slot_of, value_of, weighted_query, written


@triton.jit
def step_kernel(
    query, key, value, gate, mixing, norm_weight, mask, bounds, before, after, slots, past,
    output, scratch, arrived,
    query_row, query_token, query_head, key_row, key_token, key_head,
    value_row, value_token, value_head,
    gate_row, gate_token, gate_head, gate_state, gate_channel,
    mixing_head, norm_head, mask_row, before_slot, after_slot, length, scale, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_GROUP: tl.constexpr,
    STATES: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    TEMPERATURE: tl.constexpr, FLOOR: tl.constexpr, SCALES_WRITES: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, ALL_V: tl.constexpr, TILES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Run over the tokens of one row and state head, for BLOCK_V columns of its states."""
    pair = tl.program_id(0)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    wide = tl.arange(0, BLOCK_W)
    in_w = wide < STATES * KEY_DIM
    channel, number = wide % KEY_DIM, wide // KEY_DIM
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = column < VALUE_DIM
    wait_for_inputs(PDL)
    first = row * 0
    slot, is_active, has_past = slot_of(slots, past, row)
    if bounds is not None:
        first = tl.load(bounds + row).to(tl.int64)
        length = (tl.load(bounds + row + 1) - first).to(tl.int32)
        row = row * 0
    cells = (head * STATES * KEY_DIM + wide)[:, None] * VALUE_DIM + column[None, :]
    in_state = in_w[:, None] & in_v[None, :]
    memory = tl.zeros((BLOCK_W, BLOCK_V), tl.float32)
    if before is not None:
        found = tl.load(before + slot * before_slot + cells, mask=in_state & has_past, other=0.0)
        memory = found.to(tl.float32)
    keys = key + row * key_row + (head // KEY_GROUP) * key_head + channel
    values = value + row * value_row + (head // KEY_GROUP) * value_head + column
    gates = gate + row * gate_row + head * gate_head + number * gate_state + channel * gate_channel
    if mask is not None:
        mask += row * mask_row
    for i in range(length):
        token = first + i
        k, decay = written(
            tl.load(keys + token * key_token, mask=in_w, other=0.0),
            tl.load(gates + token * gate_token, mask=in_w, other=0.0),
            mask, token, TEMPERATURE, FLOOR, SCALES_WRITES,
        )  # fmt: skip
        v = value_of(values + token * value_token, mask, token, in_v)
        # As in the reference: what the decay lacks to 1 is exact.
        memory -= memory * once(loss(-decay))[:, None]
        memory += k[:, None] * v[None, :]
        _read(
            query + row * query_row + token * query_token, mixing, norm_weight,
            output, scratch, memory, row * length + token, head, wide, column, is_active,
            query_head, mixing_head, norm_head, scale, eps,
            HEADS, GROUP, STATES, KEY_DIM, VALUE_DIM, TILES,
        )  # fmt: skip
    target = after + slot * after_slot + cells
    tl.store(target, memory.to(after.dtype.element_ty), mask=in_state & is_active)
    if norm_weight is not None and TILES > 1:
        # The counter's atomic orders one thread's writes; the barrier those of all before it.
        tl.debug_barrier()
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel", scope="gpu") == TILES - 1:
            _normalize_rows(
                scratch, output, norm_weight, row, head, first, length, norm_head, eps,
                HEADS, GROUP, VALUE_DIM, ALL_V,
            )  # fmt: skip
            tl.store(arrived + pair, 0)


@triton.jit
def _read(
    query, mixing, norm_weight, output, scratch, memory, token, head, wide, column, is_active,
    query_head, mixing_head, norm_head, scale, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, STATES: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Store what the query heads of a group read from their state [W, V] at one token.

    Args:
        query: of that token.
        token: its number in the output.
    """
    in_w, in_v = wide < STATES * KEY_DIM, column < VALUE_DIM
    for j in range(GROUP):
        index = head * GROUP + j
        q = weighted_query(
            query + index * query_head, mixing + index * mixing_head,
            wide % KEY_DIM, wide // KEY_DIM, in_w, scale,
        )  # fmt: skip
        read = tl.sum(q[:, None] * memory, axis=0)
        read = tl.where(is_active, read, 0.0)
        place = (token * HEADS * GROUP + index) * VALUE_DIM + column
        if norm_weight is not None and TILES > 1:
            tl.store(scratch + place, read, mask=in_v)
        else:
            if norm_weight is not None:
                weights = norm_weight + index * norm_head
                read = _normalized(read, weights, column, eps, VALUE_DIM)
            tl.store(output + place, read.to(output.dtype.element_ty), mask=in_v)


@triton.jit
def _normalized(read, weights, column, eps, VALUE_DIM: tl.constexpr):
    """One head's output, all columns, divided by its root mean square and weighted."""
    factor = tl.rsqrt(tl.sum(read * read, axis=0) / VALUE_DIM + eps)
    weight = tl.load(weights + column, mask=column < VALUE_DIM, other=0.0)
    return read * factor * weight.to(tl.float32)


@triton.jit
def _normalize_rows(
    scratch, output, norm_weight, row, head, first, length, norm_head, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, ALL_V: tl.constexpr,
):  # fmt: skip
    """Normalise what all programs of a head have left in ``scratch``."""
    column = tl.arange(0, ALL_V)
    in_v = column < VALUE_DIM
    for i in range(length):
        for j in range(GROUP):
            index = head * GROUP + j
            rows = (row * length + first + i) * HEADS * GROUP + index
            # Other programs wrote it: read it from L2, where their writes are.
            read = tl.load(
                scratch + rows * VALUE_DIM + column, mask=in_v, other=0.0, cache_modifier=".cg"
            )
            normed = _normalized(read, norm_weight + index * norm_head, column, eps, VALUE_DIM)
            target = output + rows * VALUE_DIM + column
            tl.store(target, normed.to(output.dtype.element_ty), mask=in_v)
