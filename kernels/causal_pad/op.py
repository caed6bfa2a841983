"""Definition of ``fxgraft::causal_pad``."""

from __future__ import annotations

import torch

from fxgraft.kernels.causal_pad.cost import flops
from fxgraft.kernels.causal_pad.reference import causal_pad
from fxgraft.kernels.define import define
from fxgraft.kernels.spec import OpSpec, State


def _fake(
    x: torch.Tensor, state: torch.Tensor | None = None, *, size: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    padded, past = list(x.shape), list(x.shape)
    padded[dim] = x.shape[dim] + size
    past[dim] = size
    return x.new_empty(padded), x.new_empty(past)


SPEC = define(
    OpSpec(
        name="causal_pad",
        kind="mixer",
        reference=causal_pad,
        flops=flops,
        states=(State("past", "state", "fixed", output=1),),
    ),
    "(Tensor x, Tensor? state=None, *, int size, int dim) -> (Tensor, Tensor)",
    fake=_fake,
)
