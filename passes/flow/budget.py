"""The choice of one pattern per layer under an exact budget of parameters, by dynamic programming.

The cost is a sum over layers and the constraint one sum of whole numbers, so a table over "layers
so far" and "parameters pruned so far" finds the optimum that an integer program would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fxgraft.errors import InputError
from fxgraft.passes.flow.patterns import Pattern

# A table with more columns is made coarser; layers of real models have large common factors.
_MOST_STATES = 4_000_000


@dataclass(frozen=True)
class Options:
    """What one layer, or one block whose layers go together, can become.

    Attributes:
        parameters: of the layer.
        patterns: the candidates.
        costs: what each of them costs, to be summed over layers.
        pruned: how many parameters each of them prunes.
    """

    parameters: int
    patterns: tuple[Pattern, ...]
    costs: tuple[float, ...]
    pruned: tuple[int, ...]


@dataclass(frozen=True)
class Selection:
    """A pattern for every layer.

    Attributes:
        patterns: by layer.
        asked: the sparsity that was asked for.
        pruned, parameters: of all layers together.
        cost: summed.
    """

    patterns: tuple[Pattern, ...]
    asked: float
    pruned: int
    parameters: int
    cost: float

    @property
    def sparsity(self) -> float:
        """Share of the parameters that is pruned."""
        return self.pruned / self.parameters

    @property
    def is_exact(self) -> bool:
        """Whether it is what was asked for."""
        return self.pruned == _exact(self.asked) * self.parameters

    def describe(self) -> str:
        """Asked and got, and why they differ where they do."""
        text = f"sparsity {self.sparsity:.6g}"
        if self.is_exact:
            return f"{text}, as asked"
        return f"{text}, asked {self.asked:g}: the nearest above that these layers can reach"


def select(options: Sequence[Options], budget: float) -> Selection:
    """The cheapest choice whose sparsity is the budget, or the nearest above it.

    Args:
        options: by layer.
        budget: share of all parameters to prune, from 0 to below 1.

    Raises:
        InputError: the budget is above what the candidates can reach.
    """
    parameters = sum(option.parameters for option in options)
    wanted = math.ceil(_exact(budget) * parameters)
    lowest = sum(min(option.pruned) for option in options)
    highest = sum(max(option.pruned) for option in options)
    if not options or wanted > highest:
        raise InputError(
            f"pass 'flow': budget {budget:g} cannot be reached: with these candidates and layers "
            f"left dense, sparsity goes from {lowest / max(parameters, 1):g} to "
            f"{highest / max(parameters, 1):g}",
            "lower the budget, allow smaller N in 'n', or leave fewer layers dense",
        )
    unit = _unit(options, highest - lowest)
    spent = [
        [(pruned - min(option.pruned)) // unit for pruned in option.pruned] for option in options
    ]
    table, chosen = _fill(options, spent)
    floor = max(-(-(wanted - lowest) // unit), 0)
    state = floor + int(np.argmax(np.isfinite(table[floor:])))
    picks = _trace_back(chosen, spent, state)
    return Selection(
        tuple(option.patterns[pick] for option, pick in zip(options, picks, strict=True)),
        budget,
        sum(option.pruned[pick] for option, pick in zip(options, picks, strict=True)),
        parameters,
        sum(option.costs[pick] for option, pick in zip(options, picks, strict=True)),
    )


def _exact(budget: float) -> Fraction:
    """The number that was meant: 0.6 is 3/5, not the nearest binary fraction."""
    return Fraction(str(budget)).limit_denominator(10**9)


def _unit(options: Sequence[Options], span: int) -> int:
    """The largest step that all sums are multiples of; a larger one if the table were too large.

    With a larger one what is pruned is rounded down, so that the result is never below the budget.
    """
    steps = [pruned - min(option.pruned) for option in options for pruned in option.pruned]
    return max(math.gcd(*steps), -(-span // _MOST_STATES), 1)


def _fill(
    options: Sequence[Options], spent: Sequence[Sequence[int]]
) -> tuple[NDArray[np.float64], list[NDArray[np.int16]]]:
    """Least cost by units spent, and the candidate taken by layer and units."""
    size = sum(max(row) for row in spent) + 1
    table = np.full(size, np.inf)
    table[0] = 0.0
    chosen: list[NDArray[np.int16]] = []
    for option, row in zip(options, spent, strict=True):
        best, pick = np.full(size, np.inf), np.full(size, -1, dtype=np.int16)
        for index, (units, cost) in enumerate(zip(row, option.costs, strict=True)):
            shifted = table[: size - units] + cost
            better = shifted < best[units:]
            best[units:][better] = shifted[better]
            pick[units:][better] = index
        table = best
        chosen.append(pick)
    return table, chosen


def _trace_back(
    chosen: Sequence[NDArray[np.int16]], spent: Sequence[Sequence[int]], state: int
) -> list[int]:
    picks: list[int] = []
    for pick, row in zip(reversed(chosen), reversed(spent), strict=True):
        index = int(pick[state])
        picks.append(index)
        state -= row[index]
    return picks[::-1]
