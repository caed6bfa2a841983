"""Definition of ``fxgraft::wkv``."""

from __future__ import annotations

import torch

from fxgraft.kernels.define import define
from fxgraft.kernels.spec import OpSpec, State
from fxgraft.kernels.wkv.cost import flops
from fxgraft.kernels.wkv.reference import wkv


def _fake(
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    bonus: torch.Tensor,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(key.dtype, torch.float32)
    return key.new_empty(key.shape), key.new_empty(key.shape[0], key.shape[2], 3, dtype=dtype)


SPEC = define(
    OpSpec(
        name="wkv",
        kind="mixer",
        reference=wkv,
        flops=flops,
        states=(State("wkv", "state", "fixed", output=1),),
    ),
    "(Tensor key, Tensor value, Tensor decay, Tensor bonus, Tensor? state=None) "
    "-> (Tensor, Tensor)",
    fake=_fake,
)
