"""Steering as one Triton kernel: it looks up each row's vector, scales, selects and adds."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxgraft.kernels.launch import (
    DTYPES,
    launch_options,
    over,
    power_of_2,
    wait_for_inputs,
)

_WIDEST = 1 << 15


@triton.jit
def steer_kernel(
    x,
    fire,
    vector,
    coefficient,
    slot,
    output,
    length,
    width,
    VECTOR_PER_ROW: tl.constexpr,
    COEFFICIENT_PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One position; only where it fires is a vector read."""
    position = tl.program_id(0).to(tl.int64)
    row = position // length
    column = tl.arange(0, BLOCK)
    mask = column < width
    wait_for_inputs(PDL)
    value = tl.load(x + position * width + column, mask=mask, other=0.0)
    if tl.load(fire + position) != 0:
        place = tl.zeros((), tl.int64)
        if slot is not None:
            place = tl.load(slot + row)
        elif VECTOR_PER_ROW:
            place = row
        strength = tl.load(coefficient + (row if COEFFICIENT_PER_ROW else 0))
        direction = tl.load(vector + place * width + column, mask=mask, other=0.0)
        wide = strength.to(value.dtype).to(tl.float32) * direction.to(value.dtype).to(tl.float32)
        delta = wide.to(value.dtype)
        moved = (value.to(tl.float32) + delta.to(tl.float32)).to(value.dtype)
        moves = tl.max((delta.to(tl.float32) != 0.0).to(tl.int32), axis=0) != 0
        value = tl.where(moves, moved, value)
    tl.store(output + position * width + column, value, mask=mask)


def supports(x: Tensor, vector: Tensor, coefficient: Tensor) -> bool:
    """Whether ``steer`` takes these: dtypes, width, x and the vectors contiguous."""
    if any(tensor.dtype not in DTYPES for tensor in (x, vector, coefficient)):
        return False
    if x.numel() == 0 or x.shape[-1] > _WIDEST:
        return False
    return x.is_contiguous() and vector.is_contiguous()


def steer(
    x: Tensor, fire: Tensor, vector: Tensor, coefficient: Tensor, slot: Tensor | None = None
) -> Tensor:
    """Steer; arguments and result are those of ``fxgraft.kernels.steer.op``.

    The result is contiguous. ``supports`` says which arguments are taken. The cost does not depend
    on how many different vectors the rows take.
    """
    batch, length, width = x.shape
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = power_of_2(width)
    over(steer_kernel, batch * length)(
        x,
        fire.contiguous().view(torch.uint8),
        vector,
        coefficient.contiguous(),
        None if slot is None else slot.contiguous(),
        output,
        length,
        width,
        VECTOR_PER_ROW=vector.dim() == 2,
        COEFFICIENT_PER_ROW=coefficient.dim() == 1,
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
        **launch_options(x.device),
    )
    return output
