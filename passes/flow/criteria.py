"""What each N:M costs each layer, by criterion; the budget is spent where the sum is least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fxgraft.errors import InputError
from fxgraft.passes.flow.budget import Options, Selection, select
from fxgraft.passes.flow.outliers import Outliers, scaled
from fxgraft.passes.flow.patterns import Pattern, dense
from fxgraft.passes.flow.sensitivity import Rises, relative
from fxgraft.passes.flow.units import Unit

# Weights of the two terms of FLOW's released integer program, and the sizes it scales by.
_ALPHA, _BETA = 1.0, 4.0
_WIDTH_WEIGHT = 0.1


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that get the same pattern.

    Attributes:
        units: one layer, or those of a block.
        patterns: the candidates.
    """

    units: tuple[Unit, ...]
    patterns: tuple[Pattern, ...]


Costs = Callable[[int, Pattern], float]
"""What a pattern costs the group with some index."""


def groups_of(units: Sequence[Unit], granularity: str, patterns: Sequence[Pattern]) -> list[Group]:
    """The layers as they are chosen for; those left dense are groups of their own."""
    together: dict[object, list[Unit]] = {}
    for unit in units:
        alone = unit.is_left_dense or granularity == "projection"
        together.setdefault(unit if alone else unit.layer, []).append(unit)
    return [
        Group(
            tuple(members),
            (dense(patterns[0].m),) if members[0].is_left_dense else tuple(patterns),
        )
        for members in together.values()
    ]


def choose(groups: Sequence[Group], costs: Costs, budget: float) -> tuple[Selection, Assignment]:
    """The cheapest choice under the budget.

    Raises:
        InputError: the budget cannot be reached.
    """
    options = [
        Options(
            parameters=sum(unit.parameters for unit in group.units),
            patterns=group.patterns,
            costs=tuple(costs(index, pattern) for pattern in group.patterns),
            pruned=tuple(
                sum(unit.pruned(pattern) for unit in group.units) for pattern in group.patterns
            ),
        )
        for index, group in enumerate(groups)
    ]
    selection = select(options, budget)
    pairs = zip(groups, selection.patterns, strict=True)
    return selection, {unit: pattern for group, pattern in pairs for unit in group.units}


Assignment = dict[Unit, Pattern]
"""The pattern of every layer."""


def uniform(groups: Sequence[Group], budget: float) -> tuple[Selection, Assignment]:
    """One pattern for all layers: the least sparse that reaches the budget, the widest of equals.

    Raises:
        InputError: none reaches it.
    """
    free = [group for group in groups if not group.units[0].is_left_dense]
    shared = free[0].patterns if free else ()
    for pattern in sorted(shared, key=lambda pattern: (pattern.sparsity, -pattern.m)):
        only = [Group(group.units, (pattern,)) if group in free else group for group in groups]
        try:
            return choose(only, lambda index, candidate: 0.0, budget)
        except InputError:
            continue
    # The densest candidates were not enough: let the error name the reachable range.
    return choose(groups, lambda index, candidate: 0.0, budget)


def published(groups: Sequence[Group], outliers: Sequence[Outliers]) -> Costs:
    """FLOW's released objective: N near O · N_max, M near (1 − D) · M_max.

    Presence O and distribution D are min–max scaled over the groups. It pulls clustered groups to
    narrow widths, which is the opposite of the paper's figure.

    Source: FLOW, arXiv 2504.14365, released code v1.0.
    """
    presence = scaled([entry.presence for entry in outliers])
    spread = scaled([entry.published for entry in outliers])
    most = max(pattern.n for group in groups for pattern in group.patterns)
    widest = max(pattern.m for group in groups for pattern in group.patterns)

    def cost(index: int, pattern: Pattern) -> float:
        near_n = abs(pattern.n - presence[index] * most)
        near_m = abs(pattern.m - (1 - spread[index]) * widest)
        return _ALPHA * near_n + _BETA * near_m

    return cost


def figure(groups: Sequence[Group], outliers: Sequence[Outliers]) -> Costs:
    """As the paper's figure: presence sets the density, clustering widens the groups."""
    return figure_costs(
        [group.patterns for group in groups],
        scaled([entry.presence for entry in outliers]),
        scaled([entry.clustering for entry in outliers]),
    )


def figure_costs(
    patterns: Sequence[Sequence[Pattern]], presence: Sequence[float], clustering: Sequence[float]
) -> Costs:
    """The costs of ``figure`` from measures that are scaled to 0 to 1."""
    densities = [candidate.n / candidate.m for each in patterns for candidate in each]
    low, high = min(densities), max(densities)
    widths = [math.log2(candidate.m) for each in patterns for candidate in each]
    narrow, wide = min(widths), max(widths)

    def cost(index: int, pattern: Pattern) -> float:
        density = abs(pattern.n / pattern.m - (low + presence[index] * (high - low)))
        width = abs(math.log2(pattern.m) - (narrow + clustering[index] * (wide - narrow)))
        return density + _WIDTH_WEIGHT * width

    return cost


def loss(groups: Sequence[Group], rises: Mapping[Unit, Rises]) -> Costs:
    """The estimated rise of the loss."""
    by_unit = {
        unit: {m: relative(found, m) for m in found.by_width} for unit, found in rises.items()
    }

    def cost(index: int, pattern: Pattern) -> float:
        units = [unit for unit in groups[index].units if not pattern.is_dense]
        return sum(float(by_unit[unit][pattern.m][pattern.n]) for unit in units)

    return cost
