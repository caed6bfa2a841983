"""Gated activation as one Triton kernel, and the activations that other kernels end with."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxgraft.kernels.gated_activation.reference import ACTIVATIONS
from fxgraft.kernels.launch import (
    DTYPES,
    blocks_of,
    launch_options,
    over,
    row_layout,
    wait_for_inputs,
)

_BLOCK = 1024


@triton.jit
def tanh(x):
    """tanh of float32, exact at both ends."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """activation(gate) in float32; the names are those of the op ``gated_activation``."""
    if ACTIVATION == "silu":
        gate = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = 0.5 * gate * (1.0 + tanh(inner))
    elif ACTIVATION == "relu":
        gate = tl.maximum(gate, 0.0)
    else:
        tl.static_assert(ACTIVATION == "sigmoid")
        gate = tl.sigmoid(gate)
    return gate


@triton.jit
def gated_activation_kernel(
    gate,
    up,
    output,
    width,
    gate_inner,
    gate_outer_stride,
    gate_inner_stride,
    up_inner,
    up_outer_stride,
    up_inner_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """activation(gate) · up for BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate += (row // gate_inner) * gate_outer_stride + (row % gate_inner) * gate_inner_stride
    up += (row // up_inner) * up_outer_stride + (row % up_inner) * up_inner_stride
    wait_for_inputs(PDL)
    opened = activate(tl.load(gate + column, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    # The reference rounds here.
    opened = opened.to(gate.dtype.element_ty).to(tl.float32)
    result = opened * tl.load(up + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + row * width + column, result.to(output.dtype.element_ty), mask=mask)


def supports(gate: Tensor, up: Tensor, activation: str) -> bool:
    """Whether ``gated_activation`` takes these: dtypes, and how the rows lie."""
    if gate.dtype not in DTYPES or gate.dtype != up.dtype or gate.shape != up.shape:
        return False
    known = activation in ACTIVATIONS
    return known and row_layout(gate) is not None and row_layout(up) is not None


def gated_activation(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """Gate; arguments and result are those of ``fxgraft.kernels.gated_activation.op``.

    The result is contiguous. ``supports`` says which arguments are taken.
    """
    layouts = row_layout(gate), row_layout(up)
    assert layouts[0] is not None
    assert layouts[1] is not None
    width = gate.shape[-1]
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    over(gated_activation_kernel, gate.numel() // width, blocks_of(width, _BLOCK))(
        gate,
        up,
        output,
        width,
        *layouts[0],
        *layouts[1],
        ACTIVATION=activation,
        BLOCK=_BLOCK,
        num_warps=4,
        **launch_options(gate.device),
    )
    return output
