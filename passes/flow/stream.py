"""Pruning a model block by block: the inputs of each block come from the pruned ones before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft import blockwise
from fxgraft.blockwise import Part, Values
from fxgraft.kernels.nm_linear.packing import pack, unpack
from fxgraft.offline import Workspace
from fxgraft.passes.flow.objective import Objective
from fxgraft.passes.flow.patterns import Pattern
from fxgraft.passes.flow.scores import Statistics, padded
from fxgraft.passes.flow.units import Unit, grouped_ends, path_of
from fxgraft.program import Program

Measured = dict[Node, Statistics]
"""Statistics by the node that they are of; layers with the same input share them."""


@dataclass(frozen=True)
class Pruned:
    """New weights of one layer.

    Attributes:
        weights: [copies, O, K], zero where pruned.
        kept: bool [copies, O, K].
        pattern: the groups that ``kept`` follows; None without groups.
    """

    weights: Tensor
    kept: Tensor
    pattern: Pattern | None


Prune = Callable[[Unit, Tensor, Statistics], Pruned]
"""Prunes one layer, given its weights [copies, O, K] and the statistics of its inputs."""


@dataclass
class Run:
    """What a run over all blocks gives.

    Attributes:
        loss: on the calibration data, after pruning.
        tensors: the packed weights of every pruned layer, by name.
    """

    loss: float
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def measure_all(
    program: Program,
    units: Sequence[Unit],
    objective: Objective,
    work: Workspace,
    see: Callable[[Unit, Statistics], None],
) -> float:
    """Run the model as it is, and show the statistics of each layer; returns the loss.

    Args:
        program: the model.
        units: its prunable layers.
        objective: the data; notes the outputs.
        work: is told of progress.
        see: called for every layer while its block's statistics are held.
    """

    def show(mine: list[Unit], measured: Measured) -> dict[str, Tensor]:
        for unit in mine:
            see(unit, measured[unit.source])
        return {}

    walk = _Walk(program, units, objective, work, "measure")
    return walk.run(show, measure=True, is_dense=True)


def prune_all(
    program: Program,
    units: Sequence[Unit],
    objective: Objective,
    prune: Prune,
    work: Workspace,
    title: str,
    *,
    with_products: bool,
) -> Run:
    """Prune block by block, and tell the loss of the result.

    Args:
        program: the model; it is not changed.
        units: the layers to prune.
        objective: the data and the loss.
        prune: prunes one layer.
        work: keeps finished blocks, and is told of progress.
        title: of this run among those of the same stage.
        with_products: also collect Σ x xᵀ.
    """
    result = Run(0.0)

    def pruned(mine: list[Unit], measured: Measured) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for unit in mine:
            weights = unit.read(program.weight(unit.weight))
            tensors |= encode(unit, prune(unit, weights, measured[unit.source]))
        return tensors

    walk = _Walk(program, units, objective, work, title, with_products)
    result.loss = walk.run(pruned, measure=True, keep=result.tensors)
    return result


def evaluate(
    program: Program, units: Sequence[Unit], tensors: Mapping[str, Tensor], objective: Objective
) -> float:
    """The loss with pruned layers in place, block by block.

    Args:
        program: the model.
        units: its prunable layers.
        tensors: the encoded ones, none for the dense model.
        objective: the data and the loss.
    """

    def stored(mine: list[Unit], measured: Measured) -> dict[str, Tensor]:
        return {name: value for unit in mine for name, value in _of(unit, tensors).items()}

    return _Walk(program, units, objective, Workspace(), "evaluate").run(stored)


@dataclass
class _Walk:
    program: Program
    units: Sequence[Unit]
    objective: Objective
    work: Workspace
    title: str
    with_products: bool = False

    def run(
        self,
        process: Callable[[list[Unit], Measured], dict[str, Tensor]],
        *,
        measure: bool = False,
        keep: dict[str, Tensor] | None = None,
        is_dense: bool = False,
    ) -> float:
        """Go through the blocks; ``process`` gives the new weights of each, encoded.

        Args:
            process: called with a block's layers and the statistics of their inputs.
            measure: collect the statistics.
            keep: takes the new weights; blocks that were finished before are read.
            is_dense: the objective notes the outputs.
        """
        parts = blockwise.parts_of(self.program)
        batches = [blockwise.start(self.program, batch) for batch in self.objective.batches]
        for index, part in enumerate(parts[:-1]):
            self.work.progress(self.title, index, len(parts))
            inside = frozenset(part.nodes)
            mine = [unit for unit in self.units if unit.node in inside]
            compute = self._step(part, mine, batches, process, measure)
            encoded = compute() if keep is None or not mine else self._kept(mine, compute)
            if keep is not None:
                keep |= encoded
            weights = decode_all(self.program, mine, encoded)
            batches = blockwise.run_all(part, self.program, batches, weights=weights)
        loss = self._loss(parts[-1], batches, is_dense)
        self.work.progress(self.title, len(parts), len(parts))
        return loss

    def _step(
        self,
        part: Part,
        mine: list[Unit],
        batches: list[Values],
        process: Callable[[list[Unit], Measured], dict[str, Tensor]],
        measure: bool,
    ) -> Callable[[], dict[str, Tensor]]:
        def compute() -> dict[str, Tensor]:
            return process(mine, self._measure(part, mine, batches) if measure and mine else {})

        return compute

    def _kept(
        self, mine: list[Unit], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Read the part of a block that was finished before, or compute and keep it."""
        found = self.work.part(f"{self.title} {mine[0].layer:04d}".replace(" ", "-"), compute)
        return {name: value.to(self.program.device) for name, value in found.items()}

    def _measure(self, part: Part, mine: list[Unit], batches: list[Values]) -> Measured:
        """The statistics of the inputs of a block's layers, each input once."""
        first = {unit.source: unit for unit in reversed(mine)}
        device = self.program.device
        found = {
            source: Statistics.empty(
                unit.product.copies, unit.product.reduction, device,
                self.with_products,
            )
            for source, unit in first.items()
        }  # fmt: skip
        for batch, values in zip(self.objective.batches, batches, strict=True):
            samples = next(iter(batch.values())).shape[0]
            watch = {
                unit.node: _collector(unit, found[source], samples)
                for source, unit in first.items()
            }
            blockwise.run_all(part, self.program, [values], watch=watch)
        return found

    def _loss(self, last: Part, batches: list[Values], is_dense: bool) -> float:
        total, count = 0.0, 0.0
        for index, values in enumerate(batches):
            (after,) = blockwise.run_all(last, self.program, [values])
            outputs = blockwise.outputs_of(self.program, after)
            if is_dense:
                self.objective.note(outputs)
            part, size = self.objective.evaluate(index, outputs)
            total, count = total + part, count + size
        return total / max(count, 1e-30)


def _collector(unit: Unit, statistics: Statistics, samples: int) -> blockwise.Watch:
    place = unit.node.all_input_nodes

    def collect(args: tuple[Any, ...], value: Any) -> None:
        x = next(a for a, n in zip(args, unit.node.args, strict=True) if n is unit.source)
        statistics.add(x, grouped_ends(unit, args), samples, path_of(unit.product))

    assert unit.source in place
    return collect


def encode(unit: Unit, pruned: Pruned) -> dict[str, Tensor]:
    """The tensors that hold a pruned layer: packed with groups, dense without."""
    rows = pruned.weights.flatten(0, 1)
    if pruned.pattern is None:
        return {f"{unit.weight}.dense": pruned.weights}
    if pruned.pattern.is_dense:
        return {}
    n, m = pruned.pattern.n, pruned.pattern.m
    mask = padded(pruned.kept.flatten(0, 1).to(torch.uint8), m).bool()
    values, indices = pack(padded(rows, m), mask, n, m)
    return {
        f"{unit.weight}.values": values,
        f"{unit.weight}.indices": indices,
        f"{unit.weight}.pattern": torch.tensor([n, m]),
    }


def _of(unit: Unit, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one layer among those of all."""
    names = (f"{unit.weight}.{part}" for part in ("dense", "values", "indices", "pattern"))
    return {name: tensors[name] for name in names if name in tensors}


def decode(unit: Unit, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The matrices [copies, O, K] of an encoded layer; None if it was left dense."""
    shape = (unit.product.copies, unit.product.outputs, -1)
    if f"{unit.weight}.dense" in tensors:
        return tensors[f"{unit.weight}.dense"]
    if f"{unit.weight}.values" not in tensors:
        return None
    n, m = (int(size) for size in tensors[f"{unit.weight}.pattern"])
    rows = unpack(tensors[f"{unit.weight}.values"], tensors[f"{unit.weight}.indices"], n, m)
    return rows[:, : unit.product.reduction].reshape(shape)


def decode_all(
    program: Program, units: Sequence[Unit], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The new weights by name, as the model stores them."""
    found: dict[str, Tensor] = {}
    for unit in units:
        matrices = decode(unit, tensors)
        if matrices is not None:
            old = program.weight(unit.weight)
            found[unit.weight] = unit.write(old, matrices)
    return found
