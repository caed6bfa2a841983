"""``logit_sum`` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def logit_sum(
    query: Tensor, key: Tensor, chosen: Tensor, key_sum: Tensor | None = None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Sum; arguments and results are those of ``fxgraft.kernels.logit_sum.op``."""
    compute = torch.promote_types(query.dtype, torch.float32)
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    counted = torch.where(chosen[:, None, :, None], key.to(compute), 0.0)
    running = counted.cumsum(2)
    if key_sum is not None:
        running = running + key_sum[:, :, None]
    grouped = query.to(compute).reshape(batch, kv_heads, heads // kv_heads, length, head_dim)
    sums = (grouped * running[:, :, None]).sum(-1) * scale
    # A copy, so that the state holds no whole running sum, nor shares memory with another result.
    return sums.flatten(1, 2), running[:, :, -1].clone(memory_format=torch.contiguous_format)
