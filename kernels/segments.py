"""Decay between pairs of tokens, for the chunkwise forms of recurrent ops."""

from __future__ import annotations

import math

import torch


def segment_sums(log_decay: torch.Tensor) -> torch.Tensor:
    """Logarithm of the decay from token s to token t.

    Sums the tokens after s up to t, instead of subtracting two sums since the chunk began, whose
    difference loses digits where the decay is strong.

    Args:
        log_decay: per token, [B, H, T] or [B, H, T, D].

    Returns:
        [B, H, T (t), T (s)] or [B, H, T, T, D]; -inf where s is after t.
    """
    length = log_decay.shape[2]
    ones = torch.ones(length, length, dtype=torch.bool, device=log_decay.device)
    not_later, later = ones.triu(), ones.triu(1)
    if log_decay.dim() == 4:
        not_later, later = not_later.unsqueeze(-1), later.unsqueeze(-1)
    steps = log_decay.unsqueeze(3).expand(*log_decay.shape[:3], length, *log_decay.shape[3:])
    return steps.masked_fill(not_later, 0).cumsum(2).masked_fill(later, -math.inf)
