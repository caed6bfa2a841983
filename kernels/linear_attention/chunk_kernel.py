"""Chunkwise Triton kernels of ``linear_attention``: states at chunk starts, then outputs.

The formulas are those of ``chunkwise``, on heads whose N states of Dk × Dv are one of W × Dv,
W = N · Dk. ``states_kernel`` runs over the chunks of a sequence for a block of the state;
``output_kernel`` takes all chunks at once. The decay between two tokens is a product of two
factors, so log decays must be bounded, see ``chunkwise.LARGEST_SUM``.
"""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.launch import wait_for_inputs
from fxgraft.kernels.linear_attention.gate_kernel import log2_decay, write_factor
from fxgraft.kernels.linear_attention.loads_kernel import slot_of


@triton.jit
def chunk_of(
    chunk, row, bounds, starts, chunks_row, length, CHUNK: tl.constexpr, SEQUENCES: tl.constexpr
):
    """Where a chunk lies.

    Args:
        chunk: number of the chunk, in its row or (packed) among all.
        row: of the batch.
        bounds: cu_seqlens, or None.
        starts: number of each sequence's first chunk, if packed.
        chunks_row: chunks of a row, or (packed) sequences.
        SEQUENCES: packed sequences as a power of 2.

    Returns:
        Row of the tensors, first token, end, and the number under which its state is kept; the
        first token is not before the end if there is no such chunk.
    """
    first, end, number = chunk * CHUNK, length + chunk * 0, row * chunks_row + chunk
    if bounds is not None:
        each = tl.arange(0, SEQUENCES)
        begun = tl.load(starts + each, mask=each < chunks_row, other=chunk + 1) <= chunk
        sequence = tl.sum(begun.to(tl.int32), axis=0) - 1
        first = tl.load(bounds + sequence) + (chunk - tl.load(starts + sequence)) * CHUNK
        end, number = tl.load(bounds + sequence + 1), chunk
        row = row * 0
    return row, first, end, number


@triton.jit
def decayed_keys(
    keys, gates, mask, token, end, wide, key_token, gate_token,
    KEY_DIM: tl.constexpr, WIDTH: tl.constexpr,
    TEMPERATURE: tl.constexpr, FLOOR: tl.constexpr, SCALES_WRITES: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """What the tokens of a chunk write, and their log decays, to base 2.

    Args:
        keys, gates: pointers to [wide] of token 0.
        mask: pointer to token 0's, or None.
        token, end: [C] and the first token that is not of the sequence.
        wide: [K], rows of the state.
        FAST: of ``log2_decay``.

    Returns:
        Keys [C, K], 0 behind the end, and log decays [C, K], which are anything there.
    """
    inside = (token < end)[:, None] & (wide < WIDTH)[None, :]
    k = tl.load(keys + token[:, None] * key_token + (wide % KEY_DIM)[None, :], mask=inside, other=0)
    logits = tl.load(gates + token[:, None] * gate_token, mask=inside, other=0)
    decay = log2_decay(logits.to(tl.float32), TEMPERATURE, FLOOR, FAST)
    k = k.to(tl.float32)
    if SCALES_WRITES:
        k *= write_factor(decay * 0.6931471805599453)
    if mask is not None:
        is_real = (tl.load(mask + token, mask=token < end, other=0) != 0)[:, None]
        k, decay = tl.where(is_real, k, 0.0), tl.where(is_real, decay, 0.0)
    return k, decay


@triton.jit
def running_sums(decay, FAST: tl.constexpr):
    """Sums of [C, K] over the first dimension, up to each token.

    Args:
        FAST: as products of two bfloat16 parts with a triangle of ones: to 2⁻¹⁶ of a sum.
    """
    if FAST:
        within = tl.arange(0, decay.shape[0])
        ones = tl.where(within[:, None] >= within[None, :], 1.0, 0.0).to(tl.bfloat16)
        high = (decay.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        sums = tl.dot(ones, high.to(tl.bfloat16))
        sums = tl.dot(ones, (decay - high).to(tl.bfloat16), sums)
    else:
        sums = tl.cumsum(decay, axis=0)
    return sums


@triton.jit
def gates_at(
    gate, row, head, wide, gate_row, gate_head, gate_state, gate_channel, KEY_DIM: tl.constexpr
):
    """Pointers [1, K] to the gates of token 0."""
    places = (wide // KEY_DIM) * gate_state + (wide % KEY_DIM) * gate_channel
    return gate + row * gate_row + head * gate_head + places[None, :]


@triton.jit
def product(left, right, DTYPE: tl.constexpr, sums=None):
    """Matrix product with operands of DTYPE, added to ``sums`` in float32."""
    return tl.dot(left.to(DTYPE), right.to(DTYPE), sums, input_precision="tf32x3")


@triton.jit
def load_values(values, token, end, column, value_token, mask, VALUE_DIM: tl.constexpr):
    """[C, V] of one head; 0 outside the sequence and for padding."""
    inside = (token < end)[:, None] & (column < VALUE_DIM)[None, :]
    if mask is not None:
        inside = inside & (tl.load(mask + token, mask=token < end, other=0) != 0)[:, None]
    return tl.load(values + token[:, None] * value_token + column[None, :], mask=inside, other=0.0)


@triton.jit
def scaled_queries(
    query, mixing, row, token, end, head, wide, query_row, query_token, query_head, mixing_head,
    scale, KEY_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """[C, K]: queries of one head, with scale and the weight of their state."""
    in_w = wide < WIDTH
    places = query + row * query_row + token[:, None] * query_token + head * query_head
    inside = (token < end)[:, None] & in_w[None, :]
    q = tl.load(places + (wide % KEY_DIM)[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(mixing + head * mixing_head + wide // KEY_DIM, mask=in_w, other=0.0)
    return q * (scale * weight.to(tl.float32))[None, :]


@triton.jit
def state_part(states, which, wide, column, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Rows ``wide`` [K] and columns [V] of one state of ``states`` [.., WIDTH, VALUE_DIM]."""
    inside = (wide < WIDTH)[:, None] & (column < VALUE_DIM)[None, :]
    cells = which * WIDTH * VALUE_DIM + wide[:, None] * VALUE_DIM + column[None, :]
    return tl.load(states + cells, mask=inside, other=0.0)


@triton.jit
def normalized(result, weights, column, eps, VALUE_DIM: tl.constexpr):
    """Outputs [C, V], all columns, divided by their root mean squares and weighted."""
    factor = tl.rsqrt(tl.sum(result * result, axis=1) / VALUE_DIM + eps)
    gain = tl.load(weights + column, mask=column < VALUE_DIM, other=0.0).to(tl.float32)
    return result * factor[:, None] * gain[None, :]


@triton.jit
def states_kernel(
    key, value, gate, mask, bounds, starts, before, after, slots, past, states,
    key_row, key_token, key_head, value_row, value_token, value_head,
    gate_row, gate_token, gate_head, gate_state, gate_channel,
    mask_row, before_slot, after_slot, length, chunks_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_GROUP: tl.constexpr,
    STATES: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    TEMPERATURE: tl.constexpr, FLOOR: tl.constexpr, SCALES_WRITES: tl.constexpr,
    CHUNK: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DTYPE: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Keep the state before each chunk, for BLOCK_K × BLOCK_V of a head's state.

    Args:
        states: [chunks, HEADS, W, VALUE_DIM]; the other arguments as in module ``step_kernel``.
    """
    WIDTH: tl.constexpr = STATES * KEY_DIM
    pair = tl.program_id(0)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    wide = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    wait_for_inputs(PDL)
    slot, is_active, has_past = slot_of(slots, past, row)
    first, end, number = row * 0, row * 0 + length, row * chunks_row
    if bounds is not None:
        first, end = tl.load(bounds + row).to(tl.int64), tl.load(bounds + row + 1).to(tl.int64)
        number = tl.load(starts + row).to(tl.int64)
        row = row * 0
    cells = wide[:, None] * VALUE_DIM + column[None, :]
    in_state = (wide < WIDTH)[:, None] & (column < VALUE_DIM)[None, :]
    of_head = head * WIDTH * VALUE_DIM + cells
    memory = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if before is not None:
        found = tl.load(before + slot * before_slot + of_head, mask=in_state & has_past, other=0.0)
        memory = found.to(tl.float32)
    keys = key + row * key_row + (head // KEY_GROUP) * key_head
    values = value + row * value_row + (head // KEY_GROUP) * value_head
    gates = gates_at(gate, row, head, wide, gate_row, gate_head, gate_state, gate_channel, KEY_DIM)
    if mask is not None:
        mask += row * mask_row
    for _ in tl.range(tl.cdiv(end - first, CHUNK).to(tl.int32), num_stages=STAGES):
        place = states + (number * HEADS + head) * WIDTH * VALUE_DIM + cells
        tl.store(place, memory.to(states.dtype.element_ty), mask=in_state)
        token = first + tl.arange(0, CHUNK)
        k, decay = decayed_keys(
            keys, gates, mask, token, end, wide, key_token, gate_token,
            KEY_DIM, WIDTH, TEMPERATURE, FLOOR, SCALES_WRITES, FAST,
        )  # fmt: skip
        v = load_values(values, token, end, column, value_token, mask, VALUE_DIM)
        decay = tl.where((token < end)[:, None], decay, 0.0)
        sums, last = running_sums(decay, FAST), tl.sum(decay, axis=0)
        written = tl.trans(k * tl.exp2(last[None, :] - sums))
        memory = product(written, v, DTYPE, memory * tl.exp2(last)[:, None])
        first += CHUNK
        number += 1
    target = after + slot * after_slot + of_head
    tl.store(target, memory.to(after.dtype.element_ty), mask=in_state & is_active)


@triton.jit
def _add_rows(scores, result, q, k, decay, sums, memory, CHUNK: tl.constexpr, DTYPE: tl.constexpr):
    """What some rows of the state add to the scores of a chunk [C, C] and its outputs [C, V].

    Args:
        q, k, decay: [C, K].
        sums: of decay, running.
        memory: [K, V].
    """
    # Factors of a chunk are counted from this token on, so that none overflows.
    MIDDLE: tl.constexpr = CHUNK - 64
    if MIDDLE > 0:
        early = (tl.arange(0, CHUNK) < MIDDLE)[:, None]
        half = tl.sum(tl.where(early, decay, 0.0), axis=0)[None, :]
        grown = k * tl.exp2(half - sums)
        q *= tl.exp2(sums - half)
        scores = product(q, tl.trans(grown), DTYPE, scores)
        result = product(q * tl.exp2(half), memory, DTYPE, result)
    else:
        q *= tl.exp2(sums)
        scores = product(q, tl.trans(k * tl.exp2(0.0 - sums)), DTYPE, scores)
        result = product(q, memory, DTYPE, result)
    return scores, result


@triton.jit
def output_kernel(
    query, key, value, gate, mixing, norm_weight, mask, bounds, starts, past, states, output,
    query_row, query_token, query_head, key_row, key_token, key_head,
    value_row, value_token, value_head,
    gate_row, gate_token, gate_head, gate_state, gate_channel,
    mixing_head, norm_head, mask_row, length, chunks_row, scale, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_GROUP: tl.constexpr,
    STATES: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    TEMPERATURE: tl.constexpr, FLOOR: tl.constexpr, SCALES_WRITES: tl.constexpr,
    CHUNK: tl.constexpr, SEQUENCES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DTYPE: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk and query head, BLOCK_V columns of them (all, with a norm).

    Args:
        past: as in module ``step_kernel``; outputs of rows without a request are 0.
        output: [rows, tokens, query heads, VALUE_DIM]; the other arguments as in
            ``states_kernel``.
    """
    WIDTH: tl.constexpr = STATES * KEY_DIM
    pair = tl.program_id(1)
    row, query_index = (pair // (HEADS * GROUP)).to(tl.int64), pair % (HEADS * GROUP)
    head = query_index // GROUP
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    wait_for_inputs(PDL)
    is_active = row >= 0
    if past is not None:
        is_active = tl.load(past + row) >= 0
    row, first, end, number = chunk_of(
        tl.program_id(0).to(tl.int64), row, bounds, starts, chunks_row, length, CHUNK, SEQUENCES
    )
    if first < end:
        token = first + tl.arange(0, CHUNK)
        keys = key + row * key_row + (head // KEY_GROUP) * key_head
        values = value + row * value_row + (head // KEY_GROUP) * value_head
        if mask is not None:
            mask += row * mask_row
        scores = tl.zeros((CHUNK, CHUNK), tl.float32)
        result = tl.zeros((CHUNK, BLOCK_V), tl.float32)
        for start in tl.range(0, WIDTH, BLOCK_K, num_stages=STAGES):
            wide = start + tl.arange(0, BLOCK_K)
            gates = gates_at(
                gate, row, head, wide, gate_row, gate_head, gate_state, gate_channel, KEY_DIM
            )
            k, decay = decayed_keys(
                keys, gates, mask, token, end, wide, key_token, gate_token,
                KEY_DIM, WIDTH, TEMPERATURE, FLOOR, SCALES_WRITES, FAST,
            )  # fmt: skip
            q = scaled_queries(
                query, mixing, row, token, end, query_index, wide,
                query_row, query_token, query_head, mixing_head, scale, KEY_DIM, WIDTH,
            )  # fmt: skip
            memory = state_part(states, number * HEADS + head, wide, column, WIDTH, VALUE_DIM)
            sums = running_sums(decay, FAST)
            scores, result = _add_rows(scores, result, q, k, decay, sums, memory, CHUNK, DTYPE)
        within = tl.arange(0, CHUNK)
        # Selected away, never multiplied: above the diagonal they may be huge.
        scores = tl.where(within[:, None] >= within[None, :], scores, 0.0)
        v = load_values(values, token, end, column, value_token, mask, VALUE_DIM)
        result = product(scores, v, DTYPE, result)
        if norm_weight is not None:
            weights = norm_weight + query_index * norm_head
            result = normalized(result, weights, column, eps, VALUE_DIM)
        rows = (row * length + token) * HEADS * GROUP + query_index
        target = output + rows[:, None] * VALUE_DIM + column[None, :]
        inside = (token < end)[:, None] & (column < VALUE_DIM)[None, :]
        result = tl.where(is_active, result, 0.0)
        tl.store(target, result.to(output.dtype.element_ty), mask=inside)
