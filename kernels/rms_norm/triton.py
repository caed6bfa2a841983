"""Root-mean-square normalisation as one Triton kernel that reads each element once."""

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
    blocks_of,
    launch_options,
    over,
    power_of_2,
    row_layout,
    wait_for_inputs,
)

_WIDEST = 1 << 15
_TILE = 2048


@triton.jit
def rms_norm_kernel(
    x,
    weight,
    output,
    rows,
    width,
    inner,
    outer_stride,
    inner_stride,
    eps,
    offset,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Normalise ROWS rows; the order of casts is the reference's."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    start = (row // inner) * outer_stride + (row % inner) * inner_stride
    wait_for_inputs(PDL)
    value = tl.load(x + start[:, None] + column[None, :], mask=mask, other=0.0)
    wide = value.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    result = (wide * factor[:, None]).to(value.dtype)
    if weight is not None:
        gain = tl.load(weight + column, mask=column < width, other=0.0)
        gain = (gain.to(tl.float32) + offset).to(gain.dtype)
        result = result.to(tl.float32) * gain.to(tl.float32)[None, :]
    target = output + row[:, None] * width + column[None, :]
    tl.store(target, result.to(output.dtype.element_ty), mask=mask)


def supports(x: Tensor, weight: Tensor | None) -> bool:
    """Whether ``rms_norm`` takes these: dtypes, width, and how the rows of x lie."""
    if x.dtype not in DTYPES or x.dim() == 0 or not 0 < x.shape[-1] <= _WIDEST:
        return False
    if weight is not None and (weight.dtype not in DTYPES or not weight.is_contiguous()):
        return False
    return row_layout(x) is not None


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float, offset: float = 0.0) -> Tensor:
    """Normalise; arguments and result are those of ``fxgraft.kernels.rms_norm.op``.

    The result is contiguous. ``supports`` says which arguments are taken.
    """
    layout = row_layout(x)
    assert layout is not None
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    output = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = power_of_2(width)
    rows_per_program = max(1, min(_TILE // block, power_of_2(rows)))
    over(rms_norm_kernel, blocks_of(rows, rows_per_program))(
        x,
        weight,
        output,
        rows,
        width,
        *layout,
        eps,
        offset,
        ROWS=rows_per_program,
        BLOCK=block,
        num_warps=min(16, max(4, rows_per_program * block // 1024)),
        **launch_options(x.device),
    )
    return output
