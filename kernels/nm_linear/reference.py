"""A linear layer with an N:M sparse weight in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fxgraft.kernels.gated_activation import reference as gated
from fxgraft.kernels.nm_linear.packing import unpack


def nm_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    n: int,
    m: int,
    activation: str | None = None,
) -> Tensor:
    """Unpack and multiply; arguments and result are those of ``fxgraft.kernels.nm_linear.op``."""
    y = functional.linear(x, unpack(values, indices, n, m), bias)
    if activation is not None:
        gate, up = y.chunk(2, -1)
        y = gated.gated_activation(gate, up, activation=activation)
    return y if residual is None else residual + y
