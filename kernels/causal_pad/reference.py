"""Plain PyTorch form of ``causal_pad``."""

from __future__ import annotations

import torch


def causal_pad(
    x: torch.Tensor, state: torch.Tensor | None = None, *, size: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the last ``size`` entries before ``x`` in front of it.

    Args:
        x: any shape, any dtype, with S entries along ``dim``.
        state: the entries before ``x``, ``size`` of them along ``dim``; zeros if not given.
        size: number of entries to put in front, at least 1.
        dim: dimension of time.

    Returns:
        The padded tensor, ``size`` + S along ``dim``, and its last ``size`` entries: the state
        for the tokens after ``x``.
    """
    if state is None:
        shape = list(x.shape)
        shape[dim] = size
        state = x.new_zeros(shape)
    padded = torch.cat([state.to(x.dtype), x], dim)
    return padded, padded.narrow(dim, x.shape[dim], size).clone(
        memory_format=torch.contiguous_format
    )
