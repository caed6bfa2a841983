"""How much the loss rises if one layer alone is pruned, for every number of kept weights.

Measuring it for each layer and pattern takes hundreds of runs. Here one backward pass gives all of
them to second order: if pruning changes a layer's output by δ_t at token t, and g_t is the gradient
of the loss there, the loss rises by about ½ Σ_t (g_t · δ_t)² (the empirical Fisher information in
place of the curvature). The backward pass goes block by block, so only the inputs of the blocks and
one block's activations are held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft import blockwise
from fxgraft.blockwise import Part, Values
from fxgraft.offline import Workspace
from fxgraft.passes.flow.objective import Objective
from fxgraft.passes.flow.scores import Statistics, group_ranks, integers, score
from fxgraft.passes.flow.units import Unit, grouped_ends
from fxgraft.program import Program


@dataclass(frozen=True)
class Rises:
    """Rise of the summed loss by number of kept weights.

    Attributes:
        by_width: for each M, float64 [M + 1]: entry N if N of every M are kept. Entry M is 0.
    """

    by_width: dict[int, Tensor]


def measure(
    program: Program,
    units: Sequence[Unit],
    statistics: Mapping[Unit, Statistics],
    widths: Sequence[int],
    objective: Objective,
    batches: Sequence[int],
    seed: int,
    work: Workspace,
) -> dict[Unit, Rises]:
    """The rises of all layers on some of the batches.

    Args:
        program: the model; its ops have gradients.
        units: the layers.
        statistics: of their inputs, for the masks.
        widths: values of M.
        objective: the data and the loss.
        batches: which batches to take.
        seed: of random signs, for models without next-token loss.
        work: is told of progress.
    """
    parts = blockwise.parts_of(program)
    sums = {
        unit: Rises({m: torch.zeros(m + 1, dtype=torch.float64) for m in widths}) for unit in units
    }
    for done, index in enumerate(batches):
        work.progress("sensitivity", done, len(batches))
        entering = _forward(program, parts, objective.batches[index])
        gradients = _last_gradients(program, parts[-1], entering[-1], objective, index, seed)
        for part, values in reversed(list(zip(parts[1:-1], entering[1:-1], strict=True))):
            gradients, seen = _backward(program, part, values, gradients, units)
            for unit, (x, ends, slope) in seen.items():
                _add(sums[unit], unit, program, statistics[unit], x, ends, slope)
    work.progress("sensitivity", len(batches), len(batches))
    return sums


def _forward(program: Program, parts: Sequence[Part], batch: Mapping[str, Tensor]) -> list[Values]:
    """What enters each part."""
    entering = [blockwise.start(program, batch)]
    for part in parts[:-1]:
        entering += blockwise.run_all(part, program, [entering[-1]])
    return entering


def _leaves(values: Values) -> Values:
    """The values, detached, with gradients where they can have some."""
    return {
        node: value.detach().requires_grad_(value.is_floating_point())
        if isinstance(value, Tensor)
        else value
        for node, value in values.items()
    }


def _trainable(values: Values) -> dict[Node, Tensor]:
    return {
        node: value
        for node, value in values.items()
        if isinstance(value, Tensor) and value.requires_grad
    }


def _last_gradients(
    program: Program, last: Part, values: Values, objective: Objective, index: int, seed: int
) -> dict[Node, Tensor]:
    leaves = _leaves(values)
    with torch.enable_grad():
        outputs = blockwise.outputs_of(program, blockwise.run(last, program, leaves))
        loss = objective.probe(index, outputs, seed)
    return _gradients([loss], _trainable(leaves), None)


def _backward(
    program: Program,
    part: Part,
    values: Values,
    gradients: Mapping[Node, Tensor],
    units: Sequence[Unit],
) -> tuple[dict[Node, Tensor], dict[Unit, tuple[Tensor, Tensor | None, Tensor]]]:
    """Gradients of what enters a part, and (x, ends of groups, gradient of y) of its layers."""
    inside = frozenset(part.nodes)
    mine = {unit.node: unit for unit in units if unit.node in inside}
    noted: dict[Node, tuple[Tensor, Tensor | None, Tensor]] = {}

    def note(node: Node) -> blockwise.Watch:
        def watch(args: tuple[Any, ...], value: Any) -> None:
            x = next(a for a, n in zip(args, node.args, strict=True) if n is mine[node].source)
            noted[node] = (x.detach(), grouped_ends(mine[node], args), value)

        return watch

    leaves = _leaves(values)
    with torch.enable_grad():
        after = blockwise.run(part, program, leaves, watch={node: note(node) for node in mine})
    outputs = {n: value for n, value in _trainable(after).items() if n in gradients}
    inputs = _trainable(leaves) | {node: entry[2] for node, entry in noted.items()}
    found = _gradients(list(outputs.values()), inputs, [gradients[node] for node in outputs])
    seen = {
        mine[node]: (x, ends, found.pop(node))
        for node, (x, ends, _) in noted.items()
        if node in found
    }
    return found, seen


def _gradients(
    outputs: Sequence[Tensor], inputs: Mapping[Node, Tensor], weights: Sequence[Tensor] | None
) -> dict[Node, Tensor]:
    differentiate: Any = torch.autograd.grad
    found: tuple[Tensor | None, ...] = differentiate(
        outputs, list(inputs.values()), weights, allow_unused=True
    )
    named = zip(inputs, found, strict=True)
    return {node: gradient for node, gradient in named if gradient is not None}


def _add(
    rises: Rises,
    unit: Unit,
    program: Program,
    statistics: Statistics,
    x: Tensor,
    ends: Tensor | None,
    slope: Tensor,
) -> None:
    """Add one batch's rises of one layer."""
    weights = unit.read(program.weight(unit.weight))
    scores = score(unit, weights, statistics)
    copies, width = weights.shape[0], weights.shape[2]
    rows, slopes = x.reshape(-1, width).float(), slope.reshape(-1, weights.shape[1]).float()
    limits = (
        integers(ends)
        if ends is not None
        else [rows.shape[0] * (copy + 1) // copies for copy in range(copies)]
    )
    for m, total in rises.by_width.items():
        first = 0
        for copy, end in enumerate(limits):
            part = slice(first, end)
            first = end
            ranks = group_ranks(scores[copy], m)
            total += _rises(rows[part], slopes[part], weights[copy].float(), ranks, m)


def _rises(x: Tensor, slopes: Tensor, weights: Tensor, ranks: Tensor, m: int) -> Tensor:
    """½ Σ_t (g_t · δ_t)² for N = 0 to M.

    Args:
        x: [T, K].
        slopes: gradient of the loss at the outputs, [T, O].
        weights: [O, K].
        ranks: of the weights in their groups.
        m: width of the groups.
    """
    change = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    found = torch.zeros(m + 1, dtype=torch.float64)
    for rank in range(m - 1, -1, -1):
        removed = torch.where(ranks == rank, weights, 0.0)
        change -= ((x @ removed.T) * slopes).sum(-1).double()
        found[rank] = 0.5 * change.square().sum().cpu()
    return found


def relative(rises: Rises, m: int) -> Tensor:
    """The rises for N = 0 to M, made not to fall when more is pruned."""
    return torch.cummax(rises.by_width[m].flip(0), 0).values.flip(0)
