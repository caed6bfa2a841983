"""Scores of heads, and the choice of the lowest ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.passes.prune_heads.heads import Heads
from fxgraft.program import Program


def magnitude(program: Program, layers: Sequence[Heads]) -> list[Tensor]:
    """Per head ‖W_V‖ · ‖W_O‖: the most that the head can add to the residual stream."""
    return [_magnitude(program, heads) for heads in layers]


def _magnitude(program: Program, heads: Heads) -> Tensor:
    value = program.weight(heads.value.weight).detach()
    output = program.weight(heads.output.weight).detach()
    value = value.float() if heads.value.rows_first else value.float().T
    output = output.float() if heads.output.rows_first else output.float().T
    group = heads.query_heads // heads.kv_heads
    norms = [_norm(value[rows.flatten()]) for rows in heads.value.index]
    return torch.stack(
        [
            norms[head // group] * _norm(output[:, columns.flatten()])
            for head, columns in enumerate(heads.output.index)
        ]
    )


def _norm(matrix: Tensor) -> Tensor:
    return matrix.square().sum().sqrt()


def random(layers: Sequence[Heads], seed: int) -> list[Tensor]:
    """Uniform scores."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(heads.query_heads, generator=generator) for heads in layers]


def from_file(path: Path, layers: Sequence[Heads]) -> list[Tensor]:
    """Scores [layers, heads] from a safetensors file.

    Raises:
        InputError: the file cannot be read, has no ``scores``, or they do not fit the model.
    """
    place = f"pass 'prune_heads': field 'scores': {path}"
    try:
        with cast(Any, safe_open)(path, framework="pt") as file:
            scores = cast(Tensor, file.get_tensor("scores")).float()
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{place} cannot be used: {error}", "give a safetensors file with a tensor 'scores'"
        ) from error
    wanted = [len(layers), max(heads.query_heads for heads in layers)]
    if list(scores.shape) != wanted:
        raise InputError(
            f"{place} has scores of shape {list(scores.shape)}, the model needs {wanted}",
            "compute the scores on this model",
        )
    if not bool(torch.isfinite(scores).all()):
        raise InputError(f"{place} has scores that are not finite", "compute the scores again")
    return [row[: heads.query_heads] for row, heads in zip(scores, layers, strict=True)]


def select(
    scores: Sequence[Tensor],
    sparsity: float,
    scope: Literal["global", "per_layer"],
    min_heads: int,
) -> list[set[int]]:
    """The heads with the lowest scores.

    Args:
        scores: per layer [heads].
        sparsity: share of all heads to remove; fewer go where ``min_heads`` forbids more.
        scope: rank over all layers, or within each.
        min_heads: heads that every layer keeps.
    """
    removed: list[set[int]] = [set() for _ in scores]
    if scope == "per_layer":
        for index, row in enumerate(scores):
            allowed = max(len(row) - min_heads, 0)
            count = min(round(sparsity * len(row)), allowed)
            removed[index] = {int(head) for head in row.argsort()[:count]}
        return removed
    ranked = sorted(
        (float(score), layer, head)
        for layer, row in enumerate(scores)
        for head, score in enumerate(row)
    )
    budget = round(sparsity * len(ranked))
    for _, layer, head in ranked:
        if budget and len(scores[layer]) - len(removed[layer]) > min_heads:
            removed[layer].add(head)
            budget -= 1
    return removed
