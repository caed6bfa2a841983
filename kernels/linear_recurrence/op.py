"""Definition of ``fxgraft::linear_recurrence``."""

from __future__ import annotations

import torch

from fxgraft.kernels.define import define
from fxgraft.kernels.linear_recurrence.cost import flops
from fxgraft.kernels.linear_recurrence.reference import linear_recurrence
from fxgraft.kernels.spec import OpSpec, State


def _fake(
    x: torch.Tensor, decay: torch.Tensor, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2], dtype=dtype)


SPEC = define(
    OpSpec(
        name="linear_recurrence",
        kind="mixer",
        reference=linear_recurrence,
        flops=flops,
        states=(State("hidden", "state", "fixed", output=1),),
    ),
    "(Tensor x, Tensor decay, Tensor? state=None) -> (Tensor, Tensor)",
    fake=_fake,
)
