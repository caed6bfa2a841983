"""``attention_mass`` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fxgraft.kernels.attention import reference


def attention_mass(
    query: Tensor,
    key: Tensor,
    chosen: Tensor,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float = 0.0,
    normalize: bool = True,
) -> Tensor:
    """Sum up; arguments and result are those of ``fxgraft.kernels.attention_mass.op``."""
    scores, visible = reference.scores_of(
        query,
        key,
        key_mask,
        bias,
        scale=scale,
        is_causal=is_causal,
        window=window,
        chunk=chunk,
        softcap=softcap,
    )
    counts = chosen[:, None, None, :]
    if not normalize:
        counts = counts if visible is None else counts & visible
        return torch.where(counts, scores, 0.0).sum(-1)
    weights = reference.softmax_of(scores, visible, sinks)
    return torch.where(counts, weights, 0.0).sum(-1)
