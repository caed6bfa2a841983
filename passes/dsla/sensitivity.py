"""How much each layer minds being converted, and the order that follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fxgraft.passes.dsla.data import batches
from fxgraft.passes.dsla.probe import attention_inputs
from fxgraft.passes.dsla.sites import Site
from fxgraft.program import Program

ROWS = 16
_BATCH = 4


def entropy(
    query: Tensor, key: Tensor, scale: float, rows: Tensor, key_mask: Tensor | None = None
) -> Tensor:
    """Entropy of attention in nats at some query positions, one row at a time.

    Args:
        query: [B, Hq, S, D].
        key: [B, Hkv, S, D].
        scale: factor of the scores.
        rows: query positions int64 [R].
        key_mask: bool [B, S], False for padding.

    Returns:
        float32 [B, Hq, R]: -Σ A ln A over the keys up to the query's position.
    """
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, 1)
    scores = query[:, :, rows].float() @ keys.transpose(2, 3) * scale
    place = torch.arange(key.shape[2], device=key.device)
    visible = place[None, :] <= rows.to(place.device)[:, None]
    visible = visible[None] if key_mask is None else visible[None] & key_mask[:, None]
    logs = scores.masked_fill(~visible[:, None], -torch.inf).log_softmax(-1)
    return -torch.where(visible[:, None], logs.exp() * logs, 0.0).sum(-1)


def query_rows(length: int, count: int = ROWS) -> Tensor:
    """Positions spread evenly over the last quarter of a sequence."""
    start = max(length - max(length // 4, 1), 1)
    rows = torch.linspace(start, length - 1, min(count, length - start)).round().long()
    return cast(Tensor, cast(Any, rows).unique())


@torch.no_grad()
def entropy_scores(program: Program, sites: Sequence[Site], ids: Tensor) -> dict[int, float]:
    """Mean entropy of each layer over heads, samples and late positions, as a share of the most.

    Each row's entropy is divided by that of even attention, ln of the number of keys, so that
    lengths mix. Source: arXiv 2506.09316, section 3.3, which takes the last query only.

    Args:
        program: the model.
        sites: layers to score.
        ids: tokens int64 [N, S].
    """
    tapped = attention_inputs(program, [site.layer for site in sites])
    rows = query_rows(ids.shape[1]).to(program.device)
    most = torch.log(rows.float() + 1)
    sums = [0.0] * len(sites)
    for part in batches(ids.to(program.device), _BATCH):
        outputs = tapped(part)
        for number, site in enumerate(sites):
            query, key = outputs[2 * number : 2 * number + 2]
            share = entropy(query, key, site.scale, rows) / most
            sums[number] += float(share.mean(dim=(1, 2)).sum())
    return {site.layer: total / len(ids) for site, total in zip(sites, sums, strict=True)}


def ascending(scores: Mapping[int, float]) -> list[int]:
    """Layers by rising score; of equal ones the later layer first.

    Raises:
        ValueError: a score is not a number.
    """
    if any(math.isnan(score) for score in scores.values()):
        raise ValueError(f"scores {dict(scores)} hold NaN")
    return sorted(scores, key=lambda layer: (scores[layer], -layer))
