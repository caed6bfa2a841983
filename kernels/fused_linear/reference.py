"""A fused linear layer in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fxgraft.kernels.gated_activation import reference as gated
from fxgraft.kernels.rms_norm import reference as norm


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float | None = None,
    norm_offset: float = 0.0,
    activation: str | None = None,
) -> Tensor:
    """Normalise, multiply, gate and add; as in ``fxgraft.kernels.fused_linear.op``."""
    h = x if eps is None else norm.rms_norm(x, norm_weight, eps=eps, offset=norm_offset)
    y = functional.linear(h, weight, bias)
    if activation is not None:
        gate, up = y.chunk(2, -1)
        y = gated.gated_activation(gate, up, activation=activation)
    return y if residual is None else residual + y
