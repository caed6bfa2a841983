"""A linear layer with an N:M sparse weight in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fxgraft.kernels.gated_activation import reference as gated
from fxgraft.kernels.nm_linear.packing import unpack
from fxgraft.kernels.rms_norm import reference as norm


def nm_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    ends: Tensor | None = None,
    *,
    n: int,
    m: int,
    activation: str | None = None,
    eps: float | None = None,
    norm_offset: float = 0.0,
) -> Tensor:
    """Unpack and multiply; arguments and result are those of ``fxgraft.kernels.nm_linear.op``."""
    h = x if eps is None else norm.rms_norm(x, norm_weight, eps=eps, offset=norm_offset)
    weight = unpack(values, indices, n, m)
    y = functional.linear(h, weight, bias) if ends is None else _by_expert(h, weight, bias, ends)
    if activation is not None:
        gate, up = y.chunk(2, -1)
        y = gated.gated_activation(gate, up, activation=activation)
    return y if residual is None else residual + y


def _by_expert(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """All rows times each of the weights [E, F, K], of which each row keeps one product."""
    rows = x.reshape(-1, x.shape[-1])
    place = torch.arange(rows.shape[0], device=x.device)
    y = rows.new_zeros(rows.shape[0], weight.shape[1])
    for expert in range(weight.shape[0]):
        begin = ends[expert - 1] if expert else 0
        inside = (place >= begin) & (place < ends[expert])
        y = torch.where(inside[:, None], functional.linear(rows, weight[expert], bias), y)
    return y.reshape(*x.shape[:-1], weight.shape[1])
