"""The end of a greedy decode step in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each row int64 [B]; -1 where a logit is NaN or the largest inf."""
    best, index = logits.max(dim=-1)
    return torch.where(best.isfinite(), index, -1)


def greedy_step(logits: Tensor, input_ids: Tensor, past: Tensor, chosen: Tensor) -> None:
    """Choose and count on; the arguments are those of ``fxgraft.kernels.greedy_step.op``."""
    chosen.copy_(likeliest(logits))
    input_ids.copy_(chosen.clamp(min=0))
    past += past >= 0
