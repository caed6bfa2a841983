"""``head_gate`` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def head_gate(x: Tensor, score: Tensor, rows: Tensor, *, keep: int, factor: float) -> Tensor:
    """Gate; arguments and result are those of ``fxgraft.kernels.head_gate.op``."""
    suppressed = ~kept_heads(score, keep) & rows[:, None]
    # A product with 0 would leave NaN, and -0 where the head is to be gone.
    scaled = x * factor if factor else torch.zeros_like(x)
    return torch.where(suppressed[..., None], scaled, x).contiguous()


def kept_heads(score: Tensor, keep: int) -> Tensor:
    """Which heads have fewer than ``keep`` heads ahead of them, bool [B, H, S].

    Ranks are counted over all pairs of heads: no sort, and ties go to the lower index.

    Args:
        score: [B, H, S], of any sizes.
        keep: number of heads to keep.
    """
    ranked = torch.where(score.isnan(), -torch.inf, score)
    mine, other = ranked[:, :, None], ranked[:, None]
    index = torch.arange(score.shape[1], device=score.device)
    before = (index[None, :] < index[:, None])[None, :, :, None]
    ahead = (other > mine) | ((other == mine) & before)
    return ahead.sum(2) < keep
