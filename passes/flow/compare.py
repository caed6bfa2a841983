"""All methods on one model, one calibration and one evaluation: the table of sparsity methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.offline import Workspace
from fxgraft.passes.flow import baselines
from fxgraft.passes.flow.patterns import Pattern
from fxgraft.passes.flow.stream import Prune, Run, decode_all, evaluate
from fxgraft.passes.flow.study import Study, by_hessian, by_score
from fxgraft.passes.flow.units import Unit
from fxgraft.program import Program

Evaluate = Callable[[Mapping[str, Tensor]], float]
"""The figure to print, from the new weights by name."""


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        method: its name.
        sparsity: zeros it made over all prunable weights.
        calibration: its loss on the calibration data.
        held_out: its loss on the evaluation data.
        run: the weights.
    """

    method: str
    sparsity: float
    calibration: float
    held_out: float
    run: Run


@dataclass(frozen=True)
class Method:
    """A way to prune.

    Attributes:
        name: in the table.
        make: gives the function that prunes a layer; called when it is its turn.
        with_products: whether it needs Σ x xᵀ.
    """

    name: str
    make: Callable[[], Prune]
    with_products: bool = False


def methods(study: Study, *, widths: Sequence[int] = (8, 16)) -> list[Method]:
    """The methods of the table at the study's budget.

    Args:
        study: its widths must include ``widths``.
        widths: group widths; fixed patterns and OWL use the first.

    Raises:
        InputError: no N:M of the first width has the budget.
    """
    budget, first = study.settings.budget, widths[0]
    kept = first * (1 - budget)
    if not math.isclose(kept, round(kept)):
        raise InputError(
            f"sparsity {budget:g} is no N:{first}", f"compare at a multiple of {1 / first:g}"
        )
    fixed = Pattern(round(kept), first)
    units = study.found.units
    same = dict.fromkeys(units, fixed)
    found = [
        Method(f"magnitude {fixed}", lambda: baselines.magnitude(fixed)),
        Method(f"Wanda {fixed}", lambda: by_score(same)),
        Method("Wanda unstructured", lambda: baselines.wanda_rows(
            dict.fromkeys((unit.layer for unit in units), budget))),
        Method(f"SparseGPT {fixed}", lambda: baselines.sparsegpt(fixed), True),
        Method("SparseGPT unstructured", lambda: baselines.sparsegpt_unstructured(budget), True),
        Method("OWL + Wanda unstructured", lambda: baselines.wanda_rows(
            baselines.owl_sparsities(_blocks(study, 5.0), budget))),
        Method(f"OWL N:{first}", lambda: by_score(baselines.by_block(
            baselines.owl_patterns(_blocks(study, 6.0), fixed), units))),
        Method("FLOW as published", lambda: by_score(_chosen(study, "flow", (4, 8)))),
        Method("figure", lambda: by_score(_chosen(study, "figure", (4, 8)))),
    ]  # fmt: skip
    for m in widths:
        found += [
            Method(f"loss N:{m}", lambda m=m: by_score(_chosen(study, "loss", (m,)))),
            Method(f"loss N:{m}, Hessian",
                   lambda m=m: by_hessian(_chosen(study, "loss", (m,))), True),
        ]  # fmt: skip
    return found


def _blocks(study: Study, threshold: float) -> Any:
    return replace(study, settings=_changed(study, threshold=threshold)).blocks()


def _changed(study: Study, **changes: Any) -> Any:
    return study.settings.model_copy(update=changes)


def _chosen(study: Study, criterion: str, widths: tuple[int, ...]) -> dict[Unit, Pattern]:
    """What a criterion chooses with these widths; estimates of the loss are made once for all."""
    if criterion == "loss":
        study.estimate(Workspace())
    granularity = "block" if criterion == "flow" else "projection"
    settings = _changed(study, criterion=criterion, m=widths, granularity=granularity)
    return replace(study, settings=settings).select(Workspace())[1]


def run(study: Study, method: Method, held_out: Evaluate, work: Workspace) -> Line:
    """Prune with one method and measure the result."""
    made = method.make()
    result = study.run(made, method.name, work, with_products=method.with_products)
    return line(study, method.name, result, held_out)


def line(study: Study, name: str, result: Run, held_out: Evaluate) -> Line:
    """The figures of weights that a method made."""
    weights = weights_of(study, result)
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    total = sum(unit.parameters for unit in study.found.units)
    return Line(name, zeros / total, result.loss, held_out(weights), result)


def weights_of(study: Study, result: Run) -> dict[str, Tensor]:
    """The new weights by name."""
    return decode_all(study.program, study.found.units, result.tensors)


def held_out_loss(study: Study, program: Program, objective: Any) -> Evaluate:
    """The mean loss on other data."""
    units = study.found.units

    def measure(weights: Mapping[str, Tensor]) -> float:
        encoded = {
            f"{unit.weight}.dense": unit.read(weights[unit.weight])
            for unit in units
            if unit.weight in weights
        }
        return evaluate(program, units, encoded, objective)

    return measure


def text(lines: Sequence[Line], dense: float) -> str:
    """The table in Markdown, losses as perplexities."""
    rows = [
        f"| {line.method} | {line.sparsity:.4f} | {math.exp(line.calibration):.1f} | "
        f"{math.exp(line.held_out):.1f} |"
        for line in lines
    ]
    head = [
        f"dense perplexity {math.exp(dense):.2f}",
        "",
        "| method | sparsity | calibration | held out |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *rows])
