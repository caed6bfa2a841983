"""Pruning that moves the error of pruned weights to those that are kept.

SparseGPT (arXiv 2301.00774, algorithm 1): columns are pruned from left to right, and what a pruned
weight contributed is made up for, in the least squares sense, by the columns to its right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fxgraft.passes.flow.patterns import Pattern
from fxgraft.passes.flow.scores import group_mask

_BLOCK = 128
_DAMPING = 0.01

Choose = Callable[[Tensor, Tensor], Tensor]
"""Which columns of a block to keep, from its weights [O, B] and the factor's diagonal [B]."""


def inverse_factor(products: Tensor, damping: float = _DAMPING) -> tuple[Tensor, Tensor]:
    """U with UᵀU = H⁻¹, upper triangular, and which inputs are dead.

    Args:
        products: Σ x xᵀ [K, K]; a common factor changes nothing.
        damping: share of the mean diagonal added to the diagonal.

    Returns:
        U [K, K] and bool [K].
    """
    hessian = products.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    mean = diagonal[~dead].mean() if bool((~dead).any()) else diagonal.mean()
    diagonal += damping * mean
    linalg = cast(Any, torch.linalg)
    inverse = torch.cholesky_inverse(linalg.cholesky(hessian))
    return cast(Tensor, linalg.cholesky(inverse, upper=True)), dead


def prune(
    weights: Tensor, products: Tensor, choose: Choose, width: int, damping: float = _DAMPING
) -> tuple[Tensor, Tensor]:
    """Prune one matrix column by column.

    Args:
        weights: [O, K]; computed in float32, or float64 if given so.
        products: Σ x xᵀ [K, K] of its inputs.
        choose: which columns of a block to keep.
        width: blocks of columns are multiples of it.
        damping: share of the mean diagonal added to the diagonal.

    Returns:
        New weights [O, K] and bool [O, K], True where kept.
    """
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    factor, dead = inverse_factor(products.to(dtype), damping)
    work = weights.to(dtype).clone()
    work[:, dead] = 0.0
    kept = torch.ones_like(work, dtype=torch.bool)
    step = math.lcm(width, _BLOCK)
    for first in range(0, work.shape[1], step):
        block = slice(first, min(first + step, work.shape[1]))
        errors = _sweep(work[:, block], kept[:, block], factor[block, block], choose, width)
        work[:, block.stop :] -= errors @ factor[block, block.stop :]
    return work, kept


def _sweep(work: Tensor, kept: Tensor, factor: Tensor, choose: Choose, width: int) -> Tensor:
    """Prune a block of columns in place; returns the scaled errors [O, B]."""
    columns = work.T.contiguous()  # a column is updated as a contiguous row
    errors = torch.zeros_like(columns)
    diagonal = factor.diagonal()
    for column in range(columns.shape[0]):
        if column % width == 0:
            group = slice(column, min(column + width, columns.shape[0]))
            kept[:, group] = choose(columns[group].T, diagonal[group])
        gone = torch.where(kept[:, column], 0.0, columns[column]) / diagonal[column]
        errors[column] = gone
        columns[column:].addr_(factor[column, column:], gone, alpha=-1)
        columns[column].masked_fill_(~kept[:, column], 0.0)
    work.copy_(columns.T)
    return errors.T


def by_group(pattern: Pattern) -> Choose:
    """Keep the ``n`` of a group whose loss would be dearest: W² / U_jj²."""

    def choose(weights: Tensor, diagonal: Tensor) -> Tensor:
        saliency = (weights / diagonal).square()
        return group_mask(saliency, pattern)

    return choose


def by_share(share: float) -> Choose:
    """Prune a share of a block of columns, over all rows together: unstructured SparseGPT."""

    def choose(weights: Tensor, diagonal: Tensor) -> Tensor:
        saliency = (weights / diagonal).square().flatten()
        count = round(share * saliency.numel())
        order = torch.sort(saliency, stable=True).indices
        kept = torch.ones_like(saliency, dtype=torch.bool)
        kept[order[:count]] = False
        return kept.view_as(weights)

    return choose


def row_errors(change: Tensor, products: Tensor) -> Tensor:
    """‖X (W − Ŵ)ᵀ‖² of each row, [O], from Σ x xᵀ [K, K] and the change of the weights [O, K]."""
    return ((change @ products.to(change.dtype)) * change).sum(-1)
