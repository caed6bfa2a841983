"""Rotary position embedding in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate; arguments and result are those of ``fxgraft.kernels.rotary.op``."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    quarter_turn = _turn_pairs(turned) if interleaved else _turn_halves(turned)
    rotated = (turned * cos + quarter_turn * sin).to(x.dtype)
    return torch.cat((rotated, rest), -1) if width < x.shape[-1] else rotated


def _turn_halves(x: Tensor) -> Tensor:
    """(a, b) → (-b, a) for a the first and b the second half of the channels."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _turn_pairs(x: Tensor) -> Tensor:
    """(a, b) → (-b, a) for each two neighbouring channels."""
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
