"""Fixed state from slots, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def read_slots(pool: Tensor, slots: Tensor, past: Tensor) -> Tensor:
    """Read; arguments and result are those of ``fxgraft.kernels.read_slots.op``."""
    found = pool.index_select(0, slots)
    started = (past > 0).view(-1, *[1] * (found.dim() - 1))
    return torch.where(started, found, 0)
