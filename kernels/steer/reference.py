"""Steering in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def steer(
    x: Tensor, fire: Tensor, vector: Tensor, coefficient: Tensor, slot: Tensor | None = None
) -> Tensor:
    """Steer; arguments and result are those of ``fxgraft.kernels.steer.op``."""
    rows = vector if slot is None else vector.index_select(0, slot)
    delta = coefficient.to(x.dtype)[..., None] * rows.to(x.dtype)
    moves = fire & (delta != 0).any(-1, keepdim=True)
    return torch.where(moves[..., None], x + delta.unsqueeze(-2), x)
