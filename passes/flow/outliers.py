"""Presence and clustering of outlier weights, block by block.

A weight is an outlier if its score is more than ``threshold`` times the mean score of its block
(OWL, arXiv 2310.05175, section 3; FLOW, arXiv 2504.14365).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxgraft.passes.flow.scores import grouped, padded

# FLOW's released code looks at so many outliers of a block, the first ones.
_FIRST = 10_000


@dataclass(frozen=True)
class Outliers:
    """Measures of one block, or of one layer.

    Attributes:
        presence: share of outliers, in percent.
        clustering: outlier pairs that share a group, over what random places in the whole block
            would give: 1 as random, above 1 clustered, below 1 spread out.
        published: FLOW's released measure, 1 / mean distance between the first outliers.
    """

    presence: float
    clustering: float
    published: float


def measure(scores: Sequence[Tensor], threshold: float, width: int) -> Outliers:
    """Measure the layers of one block together.

    Args:
        scores: of each layer [copies, O, K].
        threshold: times the mean score.
        width: of the groups for clustering.
    """
    total = sum(float(layer.double().sum()) for layer in scores)
    count = sum(layer.numel() for layer in scores)
    limit = threshold * total / count
    marks = [layer > limit for layer in scores]
    rate = sum(int(mark.sum()) for mark in marks) / count
    return Outliers(100 * rate, clustering(marks, rate, width), published_distance(marks))


def clustering(marks: Sequence[Tensor], rate: float, width: int) -> float:
    """Outlier pairs that share a group of ``width``, over the number at random places.

    Args:
        marks: bool [..., K] of each layer; a last short group is filled with non-outliers.
        rate: share of outliers.
        width: of the groups.
    """
    if rate == 0:
        return 1.0
    pairs, groups = 0.0, 0
    for mark in marks:
        inside = grouped(padded(mark.float(), width), width).sum(-1)
        pairs += float((inside * (inside - 1)).double().sum())
        groups += inside.numel()
    return pairs / (groups * width * (width - 1) * rate**2)


def published_distance(marks: Sequence[Tensor]) -> float:
    """1 / mean distance over all pairs of the first outliers in flat order; 0 for fewer than two.

    It depends on the order of the layers. Sorted positions make it linear in their number.
    """
    found: list[Tensor] = []
    offset = count = 0
    for mark in marks:
        places = mark.flatten().nonzero().flatten()[: _FIRST - count]
        found.append(places.double() + offset)
        offset, count = offset + mark.numel(), count + places.numel()
    places = torch.cat(found)
    if count < 2:
        return 0.0
    rank = torch.arange(count, dtype=torch.float64, device=places.device)
    distance = float((places * (2 * rank - count + 1)).sum()) / (count * (count - 1) / 2)
    return 1 / distance


def scaled(values: Sequence[float]) -> list[float]:
    """Min–max scaled to 0 to 1; all 0 if they are equal."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]
