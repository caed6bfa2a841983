"""One model and its calibration data: measure once, then choose and prune in several ways."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxgraft import calibration
from fxgraft.calibration import Inputs
from fxgraft.errors import InputError
from fxgraft.offline import Workspace
from fxgraft.passes.flow import criteria, hessian, outliers, sensitivity, stream
from fxgraft.passes.flow import units as layers
from fxgraft.passes.flow.budget import Selection
from fxgraft.passes.flow.criteria import Assignment, Group
from fxgraft.passes.flow.objective import Objective
from fxgraft.passes.flow.outliers import Outliers
from fxgraft.passes.flow.patterns import Pattern
from fxgraft.passes.flow.scores import Statistics, group_mask, score
from fxgraft.passes.flow.sensitivity import Rises
from fxgraft.passes.flow.settings import FlowSettings
from fxgraft.passes.flow.stream import Prune, Pruned, Run
from fxgraft.passes.flow.units import Found, Unit
from fxgraft.program import Program


@dataclass
class Study:
    """What is known of a model on its calibration data.

    Attributes:
        program: the dense model.
        settings: of the pass.
        found: its prunable layers.
        objective: the data and the loss.
        statistics: of the inputs of every layer, in the dense model.
        dense_loss: of the dense model.
        rises: estimates of the loss, once criterion ``loss`` was asked for.
        seconds: spent, by step.
    """

    program: Program
    settings: FlowSettings
    found: Found
    objective: Objective
    statistics: dict[Unit, Statistics] = field(default_factory=dict[Unit, Statistics])
    dense_loss: float = 0.0
    rises: dict[Unit, Rises] = field(default_factory=dict[Unit, Rises])
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @staticmethod
    def of(
        program: Program,
        settings: FlowSettings,
        work: Workspace,
        batches: Sequence[Inputs] | None = None,
    ) -> Study:
        """Load the data, find the layers and run the dense model once.

        Args:
            program: the model.
            settings: of the pass.
            work: is told of progress.
            batches: the data, in place of the settings' files.

        Raises:
            InputError: data, patterns and model do not fit together, or hold NaN.
        """
        found = find(program, settings)
        if batches is None:
            batches = calibration.load(program, settings.data, settings.choice)
        inputs = calibration.to_device(batches, program.device)
        study = Study(program, settings, found, Objective.of(program, inputs))
        with study.timed("measure"):
            study.dense_loss = stream.measure_all(
                program, found.units, study.objective, work, study.statistics.__setitem__
            )
        study.check_weights()
        return study

    def timed(self, step: str) -> _Timer:
        """Add the time spent inside to a step's."""
        return _Timer(self.seconds, step)

    def scores(self, unit: Unit) -> Tensor:
        """Wanda's scores [copies, O, K] in the dense model."""
        return score(unit, unit.read(self.program.weight(unit.weight)), self.statistics[unit])

    def check_weights(self) -> None:
        """Refuse weights that are not finite, before any mask is made.

        Raises:
            InputError: names the first module.
        """
        for unit in self.found.units:
            self.scores(unit)

    def groups(self) -> list[Group]:
        """The layers as they are chosen for."""
        settings = self.settings
        return criteria.groups_of(self.found.units, settings.granularity, settings.patterns)

    def outliers(self, units: Sequence[Unit]) -> Outliers:
        """Presence and clustering of outliers of some layers together."""
        scores = [self.scores(unit) for unit in units]
        return outliers.measure(scores, self.settings.threshold, max(self.settings.m))

    def blocks(self) -> dict[int, Outliers]:
        """Presence and clustering by block."""
        indices = dict.fromkeys(unit.layer for unit in self.found.units)
        return {
            index: self.outliers([unit for unit in self.found.units if unit.layer == index])
            for index in indices
        }

    def select(self, work: Workspace) -> tuple[Selection, Assignment]:
        """A pattern for every layer, by the criterion.

        Raises:
            InputError: the budget cannot be reached.
        """
        groups, settings = self.groups(), self.settings
        if settings.criterion == "uniform":
            return criteria.uniform(groups, settings.budget)
        if settings.criterion == "loss":
            costs = criteria.loss(groups, self.estimate(work))
        else:
            found = [self.outliers(group.units) for group in groups]
            rule = criteria.published if settings.criterion == "flow" else criteria.figure
            costs = rule(groups, found)
        return criteria.choose(groups, costs, settings.budget)

    def estimate(self, work: Workspace) -> dict[Unit, Rises]:
        """The estimated rise of the loss by layer and pattern; computed once."""
        if not self.rises:
            chosen = range(min(self.settings.probes, len(self.objective.batches)))
            free = [unit for unit in self.found.units if not unit.is_left_dense]
            widths = sorted(set(self.settings.m))
            with self.timed("sensitivity"):
                stored = work.part("sensitivity", lambda: self._rises(free, widths, chosen, work))
            for index, unit in enumerate(free):
                by_width = {m: stored[f"{index}.{m}"] for m in widths}
                self.rises[unit] = Rises(by_width)
        return self.rises

    def _rises(
        self, units: Sequence[Unit], widths: Sequence[int], chosen: range, work: Workspace
    ) -> dict[str, Tensor]:
        found = sensitivity.measure(
            self.program, units, self.statistics, widths, self.objective, chosen,
            self.settings.seed, work,
        )  # fmt: skip
        return {
            f"{index}.{m}": found[unit].by_width[m]
            for index, unit in enumerate(units)
            for m in widths
        }

    def prune(self, assignment: Assignment, title: str, work: Workspace) -> Run:
        """Prune the model block by block."""
        with_products = self.settings.update == "hessian"
        method = by_hessian(assignment) if with_products else by_score(assignment)
        return self.run(method, title, work, with_products=with_products)

    def run(self, method: Prune, title: str, work: Workspace, *, with_products: bool) -> Run:
        """Prune the model with any method."""
        with self.timed(title):
            return stream.prune_all(
                self.program, self.found.units, self.objective, method, work, title,
                with_products=with_products,
            )  # fmt: skip


@dataclass
class _Timer:
    seconds: dict[str, float]
    step: str
    start: float = 0.0

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        spent = time.perf_counter() - self.start
        self.seconds[self.step] = self.seconds.get(self.step, 0.0) + spent


def find(program: Program, settings: FlowSettings) -> Found:
    """The prunable layers, checked against the settings.

    Raises:
        InputError: there are none, or groups do not fit them.
    """
    found = layers.find(program, settings.keep_dense, settings.include)
    if not any(not unit.is_left_dense for unit in found.units):
        raise InputError(
            "pass 'flow' found no linear layer to prune inside a block",
            "use a model with numbered blocks, or leave fewer layers dense",
        )
    layers.check_widths(found.units, settings.patterns, settings.pad)
    return found


def masked(unit: Unit, weights: Tensor, scores: Tensor, pattern: Pattern) -> Pruned:
    """The weights with the largest scores of each group."""
    kept = group_mask(scores, pattern)
    return Pruned(torch.where(kept, weights, 0), kept, pattern)


def by_score(assignment: Assignment) -> Prune:
    """Wanda's masks; kept weights stay as they are."""

    def prune(unit: Unit, weights: Tensor, statistics: Statistics) -> Pruned:
        return masked(unit, weights, score(unit, weights, statistics), assignment[unit])

    return prune


def by_hessian(assignment: Assignment) -> Prune:
    """SparseGPT's masks and updates; for rows that it does not help, Wanda's masks."""

    def prune(unit: Unit, weights: Tensor, statistics: Statistics) -> Pruned:
        pattern = assignment[unit]
        plain = masked(unit, weights, score(unit, weights, statistics), pattern)
        if pattern.is_dense or statistics.products is None:
            return plain
        for copy in range(weights.shape[0]):
            if copy not in statistics.unseen:
                products = statistics.products[copy]
                _update(plain, copy, weights[copy], products, hessian.by_group(pattern))
        return plain

    return prune


def _update(
    pruned: Pruned, copy: int, weights: Tensor, products: Tensor, choose: hessian.Choose
) -> None:
    """Put the updated rows of one matrix where they are closer to the dense outputs."""
    assert pruned.pattern is not None
    new, kept = hessian.prune(weights, products, choose, pruned.pattern.m)
    wide = new.to(weights.dtype).float()
    old = hessian.row_errors(weights.float() - pruned.weights[copy].float(), products)
    better = hessian.row_errors(weights.float() - wide, products) < old
    pruned.weights[copy][better] = wide[better].to(weights.dtype)
    pruned.kept[copy][better] = kept[better]
