"""Root-mean-square normalisation in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float, offset: float = 0.0) -> Tensor:
    """Normalise; arguments and result are those of ``fxgraft.kernels.rms_norm.op``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return scale(y.to(x.dtype), weight, offset)


def scale(y: Tensor, weight: Tensor | None, offset: float) -> Tensor:
    """y · (weight + offset), or y if there is no weight."""
    if weight is None:
        return y
    return y * (weight + offset if offset else weight)
