"""Published ways to prune, on the same statistics: magnitude, Wanda, SparseGPT, OWL.

Sources: Wanda (arXiv 2306.11695), SparseGPT (arXiv 2301.00774), OWL (arXiv 2310.05175).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxgraft.passes.flow import hessian
from fxgraft.passes.flow.outliers import Outliers, scaled
from fxgraft.passes.flow.patterns import Pattern
from fxgraft.passes.flow.scores import Statistics, group_mask, row_mask, score
from fxgraft.passes.flow.stream import Prune, Pruned
from fxgraft.passes.flow.units import Unit

_BLOCK = 128
# OWL's settings: how far block sparsities may be from the mean, unstructured and in N of N:M.
_UNSTRUCTURED_SPAN, _GROUP_SPAN = 0.08, 2.0


def magnitude(pattern: Pattern) -> Prune:
    """Keep the largest weights of each group."""

    def prune(unit: Unit, weights: Tensor, statistics: Statistics) -> Pruned:
        kept = group_mask(weights.float().abs(), pattern)
        return Pruned(torch.where(kept, weights, 0), kept, pattern)

    return prune


def wanda_rows(sparsity: Mapping[int, float]) -> Prune:
    """Wanda without groups: a share of each row, by block."""

    def prune(unit: Unit, weights: Tensor, statistics: Statistics) -> Pruned:
        count = round(sparsity[unit.layer] * weights.shape[-1])
        kept = row_mask(score(unit, weights, statistics), count)
        return Pruned(torch.where(kept, weights, 0), kept, None)

    return prune


def sparsegpt(pattern: Pattern) -> Prune:
    """SparseGPT's N:M."""
    return _sparsegpt(hessian.by_group(pattern), pattern.m, pattern)


def sparsegpt_unstructured(sparsity: float) -> Prune:
    """SparseGPT without groups: a share of every 128 columns."""
    return _sparsegpt(hessian.by_share(sparsity), _BLOCK, None)


def _sparsegpt(choose: hessian.Choose, width: int, pattern: Pattern | None) -> Prune:
    def prune(unit: Unit, weights: Tensor, statistics: Statistics) -> Pruned:
        assert statistics.products is not None
        pairs = [
            hessian.prune(matrix, products, choose, width)
            for matrix, products in zip(weights, statistics.products, strict=True)
        ]
        new = torch.stack([pair[0] for pair in pairs]).to(weights.dtype)
        return Pruned(new, torch.stack([pair[1] for pair in pairs]), pattern)

    return prune


def owl_sparsities(outliers: Mapping[int, Outliers], sparsity: float) -> dict[int, float]:
    """OWL's unstructured sparsity of each block: blocks with more outliers keep more."""
    shares = scaled([entry.presence for entry in outliers.values()])
    spread = [2 * _UNSTRUCTURED_SPAN * share for share in shares]
    mean = sum(spread) / len(spread)
    pairs = zip(outliers, spread, strict=True)
    return {block: min(max(sparsity - (each - mean), 0.0), 1.0) for block, each in pairs}


def owl_patterns(outliers: Mapping[int, Outliers], pattern: Pattern) -> dict[int, Pattern]:
    """OWL's N:M of each block: N moves with the outliers, M stays."""
    shares = scaled([entry.presence for entry in outliers.values()])
    spread = [_GROUP_SPAN * share for share in shares]
    mean = sum(spread) / len(spread)
    pairs = zip(outliers, spread, strict=True)
    return {
        block: Pattern(min(max(pattern.n + round(each - mean), 1), pattern.m), pattern.m)
        for block, each in pairs
    }


def by_block(patterns: Mapping[int, Pattern], units: Sequence[Unit]) -> dict[Unit, Pattern]:
    """The pattern of every layer from that of its block."""
    return {unit: patterns[unit.layer] for unit in units}
