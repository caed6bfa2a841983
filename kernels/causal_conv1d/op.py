"""Definition of ``fxgraft::causal_conv1d``."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fxgraft.kernels.causal_conv1d.cost import flops
from fxgraft.kernels.causal_conv1d.reference import activate, causal_conv1d, with_past
from fxgraft.kernels.define import define
from fxgraft.kernels.spec import OpSpec, State


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    activation: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, channels, _ = x.shape
    return x.new_empty(x.shape), x.new_empty(batch, channels, weight.shape[1] - 1)


def _implementation(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    activation: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    window = with_past(x, weight.shape[1] - 1, state)
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if x.shape[2] == 1:
        output = (window * weight).sum(-1, keepdim=True)
        output = output if bias is None else output + bias[:, None]
    else:
        output = F.conv1d(window, weight.unsqueeze(1), bias, groups=x.shape[1])
    output = activate(output, activation).contiguous()
    return output, window[..., x.shape[2] :].clone(memory_format=torch.contiguous_format)


SPEC = define(
    OpSpec(
        name="causal_conv1d",
        kind="mixer",
        reference=causal_conv1d,
        flops=flops,
        states=(State("conv", "state", "fixed", output=1),),
    ),
    "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? state=None, *, "
    'str activation="") -> (Tensor, Tensor)',
    fake=_fake,
    implementation=_implementation,
)
