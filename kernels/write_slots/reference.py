"""Fixed state into slots, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def write_slots(pool: Tensor, slots: Tensor, value: Tensor) -> None:
    """Write; the arguments are those of ``fxgraft.kernels.write_slots.op``."""
    pool.index_copy_(0, slots, value)
