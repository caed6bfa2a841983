"""Design-space sweeps: many configurations for one Program, and the ones that none beats."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxgraft.backends.flexcim.area import macro_area
from fxgraft.backends.flexcim.model import CostModel
from fxgraft.errors import InputError

Step = tuple[int, int, int]
"""Batch, new tokens, context."""


@dataclass(frozen=True)
class Design:
    """One configuration.

    Attributes:
        values: of the swept fields.
        seconds, joules: of all steps of the workload.
        transistors: of all macros.
        utilisation: of cells, mean over the steps.
        problem: why it cannot be, empty if it can.
    """

    values: dict[str, Any]
    seconds: float = 0.0
    joules: float = 0.0
    transistors: float = 0.0
    utilisation: float = 0.0
    problem: str = ""


def sweep(
    model: CostModel,
    axes: Mapping[str, Sequence[Any]],
    steps: Sequence[Step] = ((1, 1, 512), (1, 512, 0)),
) -> list[Design]:
    """Cost a Program on every combination of some fields of the hardware.

    Args:
        model: whose Program and other constants are used.
        axes: values by field, for example ``{"sub_macros": [2, 4], "macros": [32, 64]}``.
        steps: the workload; times and energies are added up.

    Raises:
        InputError: a field is unknown or there is no step.
    """
    if not steps:
        raise InputError("argument 'steps' is empty", "give (batch, new tokens, context)")
    known = {name.rpartition(".")[2] for name, *_ in model.hardware.constants()}
    for name, values in axes.items():
        if name not in known or not values:
            raise InputError(f"field {name!r} cannot be swept over {list(values)}",
                             f"the fields are: {', '.join(sorted(known))}")  # fmt: skip
    found: list[Design] = []
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        found.append(_design(model, values, steps))
    return found


def _design(model: CostModel, values: dict[str, Any], steps: Sequence[Step]) -> Design:
    try:
        one = model.on(model.hardware.changed(**values))
        costs = [one.costs(*step) for step in steps]
    except InputError as error:
        return Design(values, problem=error.problem)
    return Design(
        values,
        sum(cost.seconds for cost in costs),
        sum(cost.joules for cost in costs),
        macro_area(one.hardware, one.widest).total * one.hardware.macros,
        sum(cost.utilisation for cost in costs) / len(costs),
    )


def pareto(designs: Sequence[Design]) -> list[Design]:
    """The designs that no other one equals or beats in time, energy and area at once."""
    able = [design for design in designs if not design.problem]
    keys = {id(d): (d.seconds, d.joules, d.transistors) for d in able}

    def beaten(one: Design) -> bool:
        mine = keys[id(one)]
        return any(
            key != mine and all(a <= b for a, b in zip(key, mine, strict=True))
            for key in keys.values()
        )

    return sorted((d for d in able if not beaten(d)), key=lambda d: d.seconds)
