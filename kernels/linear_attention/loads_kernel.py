"""What programs of ``linear_attention`` that hold whole states load: their slot, and a token."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

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
def written(
    keys, values, gates, mask, token, in_w, in_v,
    TEMPERATURE: tl.constexpr, FLOOR: tl.constexpr, SCALES_WRITES: tl.constexpr,
):  # fmt: skip
    """Key [W], value [V] and log decay [W] of one token; 0 where it is padding.

    Args:
        keys, values, gates: pointers [W], [V] and [W].
        mask: pointer to whether tokens are real, or None; of the token with number ``token``.
        in_w, in_v: which of them exist.
    """
    k = tl.load(keys, mask=in_w, other=0.0).to(tl.float32)
    v = tl.load(values, mask=in_v, other=0.0).to(tl.float32)
    decay = log_decay(tl.load(gates, mask=in_w, other=0.0).to(tl.float32), TEMPERATURE, FLOOR)
    if SCALES_WRITES:
        k *= write_factor(decay)
    if mask is not None:
        is_real = tl.load(mask + token) != 0
        k, v = tl.where(is_real, k, 0.0), tl.where(is_real, v, 0.0)
        decay = tl.where(is_real, decay, 0.0)
    return k, v, decay
