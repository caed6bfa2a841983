"""What programs of ``linear_attention`` that hold whole states load: slot, state ahead, tokens."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.launch import prefetch
from fxgraft.kernels.linear_attention.gate_kernel import log_decay, write_factor


@triton.jit
def slot_of(slots, past, row):
    """The slot of a row, whether it has a request, and whether that has tokens before.

    Args:
        slots, past: of ``fxgraft.kernels.linear_attention_slots.op``, or None: then row r is slot
            r, and every row has a state.
        row: int64.
    """
    slot, is_active, has_past = row, row >= 0, row >= 0
    if slots is not None:
        slot, seen = tl.load(slots + row).to(tl.int64), tl.load(past + row)
        is_active = (slot >= 0) & (seen >= 0)
        has_past = is_active & (seen > 0)
    return slot, is_active, has_past


@triton.jit
def prefetch_state(
    states, slots, row, slot_stride, slot_count, wide, start,
    WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Bring COLUMNS columns of a head's states into L2, before slots are known to be valid.

    Args:
        states: of the head, in slot 0.
        slots, row: of ``slot_of``; any slot will do.
        wide: [W].
        start: the first column.
    """
    LINE: tl.constexpr = 1024 // states.dtype.element_ty.primitive_bitwidth
    guess = row
    if slots is not None:
        guess = tl.load(slots + row, cache_modifier=".cg").to(tl.int64)
    guess = tl.minimum(tl.maximum(guess, 0), slot_count - 1)
    column = start + tl.arange(0, (COLUMNS + LINE - 1) // LINE) * LINE
    cells = tl.minimum(wide, WIDTH - 1)[:, None] * VALUE_DIM
    cells += tl.minimum(column, VALUE_DIM - 1)[None, :]
    prefetch(states + guess * slot_stride + cells, PDL)


@triton.jit
def state_columns(places, in_w, in_v):
    """Columns [W, V] of a state in float32, from pointers; 0 where a row or column is not in."""
    return tl.load(places, mask=in_w[:, None] & in_v[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_columns(places, memory, in_w, in_v):
    """Store columns [W, V] of a state, at pointers."""
    tl.store(places, memory.to(places.dtype.element_ty), mask=in_w[:, None] & in_v[None, :])


@triton.jit
def written(
    k, gate, mask, token,
    TEMPERATURE: tl.constexpr, FLOOR: tl.constexpr, SCALES_WRITES: tl.constexpr,
):  # fmt: skip
    """What one token writes and its log decay [W]; 0 where it is padding.

    Args:
        k, gate: [W].
        mask: pointer to whether tokens are real, or None; of the token with number ``token``.
    """
    k, decay = k.to(tl.float32), log_decay(gate.to(tl.float32), TEMPERATURE, FLOOR)
    if SCALES_WRITES:
        k *= write_factor(decay)
    if mask is not None:
        is_real = tl.load(mask + token) != 0
        k, decay = tl.where(is_real, k, 0.0), tl.where(is_real, decay, 0.0)
    return k, decay


@triton.jit
def value_of(values, mask, token, in_v):
    """Value [V] of one token, from pointers; 0 where it is padding (``mask`` as in ``written``)."""
    v = tl.load(values, mask=in_v, other=0.0).to(tl.float32)
    if mask is not None:
        v = tl.where(tl.load(mask + token) != 0, v, 0.0)
    return v


@triton.jit
def weighted_query(query, mixing, channel, number, in_w, scale):
    """Query of one head, with scale and the weight of its state [W].

    Args:
        query, mixing: pointers to the head's first element.
        channel, number: [W], of the query and of the state.
    """
    q = tl.load(query + channel, mask=in_w, other=0.0).to(tl.float32)
    weight = tl.load(mixing + number, mask=in_w, other=0.0).to(tl.float32)
    return q * (scale * weight)
