"""Plain PyTorch form of ``causal_conv1d``."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fxgraft.errors import InputError


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    activation: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve each channel with its own short filter over the present and the past.

    ``output[t] = activation(bias + sum_w weight[w] * x[t - W + 1 + w])``.

    Args:
        x: [B, C, S].
        weight: [C, W]; its last tap is the one for the present token.
        bias: [C].
        state: the W - 1 inputs before ``x``, [B, C, W - 1]; zeros if not given.
        activation: ``""`` or ``"silu"``.

    Returns:
        The output [B, C, S] and the last W - 1 inputs [B, C, W - 1], both of ``x``'s dtype.

    Raises:
        InputError: unknown activation.
    """
    length, width = x.shape[2], weight.shape[1]
    window = with_past(x, width - 1, state)
    dtype = torch.promote_types(x.dtype, torch.float32)
    output = torch.zeros_like(x, dtype=dtype)
    for tap in range(width):
        output = output + weight[:, tap, None].to(dtype) * window[..., tap : tap + length].to(dtype)
    if bias is not None:
        output = output + bias[:, None].to(dtype)
    return activate(output, activation).to(x.dtype), window[..., length:].clone()


def with_past(x: torch.Tensor, size: int, state: torch.Tensor | None) -> torch.Tensor:
    """``x`` [B, C, S] with ``size`` earlier inputs, or zeros, in front: [B, C, size + S]."""
    if state is None:
        return F.pad(x, (size, 0))
    return torch.cat([state.to(x.dtype), x], 2)


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Apply the activation of that name.

    Raises:
        InputError: unknown activation.
    """
    if activation == "silu":
        return F.silu(x)
    if activation == "":
        return x
    raise InputError(f"causal_conv1d has no activation {activation!r}", 'use "" or "silu"')
