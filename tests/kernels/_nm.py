"""Random N:M masks, and Programs whose weights obey them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxgraft.packed_weights import pack_weights
from fxgraft.program import Program
from tests.kernels._helpers import randn


def mask_of(rows: int, columns: int, n: int, m: int, seed: int = 3) -> Tensor:
    """Bool [rows, columns] that keeps n random columns of every group of m; always the same."""
    scores = randn(rows, columns // m, m, seed=seed)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter(-1, scores.topk(n, -1).indices, value=True).view(rows, columns)


def prune(program: Program, patterns: dict[str, tuple[int, int]]) -> Program:
    """A copy whose weights are zero where a random mask says so.

    Args:
        program: is not changed.
        patterns: N and M by a part of the weight's name.
    """
    pruned = program.copy()
    for name, weight in list(pruned.weights()):
        for part, (n, m) in patterns.items():
            if part in name and weight.dim() == 2:
                masked = weight.detach() * mask_of(
                    weight.shape[0], weight.shape[1], n, m, seed=len(name)
                )
                pruned.set_weight(name, nn.Parameter(masked, requires_grad=False))
    return pruned


def packed(program: Program, patterns: dict[str, tuple[int, int]]) -> Program:
    """A copy of a pruned Program, its pruned weights packed; see ``prune``."""
    copy = program.copy()
    names = {
        name: pattern
        for name, weight in program.weights()
        for part, pattern in patterns.items()
        if part in name and weight.dim() == 2
    }
    left = pack_weights(copy, names)
    assert not left, left
    return copy
