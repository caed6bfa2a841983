"""Choosing knots so that linear interpolation between them comes close to a function."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from fxgraft.cost_table_grid import Array, on_knots

Function = Callable[[list[Array]], Array]
"""Values [fields, points] at points, one array [points] per axis."""

_ROUNDS = 24


def fit(
    function: Function,
    ranges: Sequence[tuple[int, int]],
    *,
    tolerance: float = 1e-3,
    floor: Sequence[float] = (),
    most: int = 65,
) -> tuple[list[tuple[int, ...]], Array]:
    """Knots on each axis, and the function's values at their crossings.

    Begins with powers of two and halves each interval in whose middle some field is further from
    the interpolation than the tolerance, at any knot of the other axes.

    Args:
        function: of whole numbers.
        ranges: inclusive, one per axis.
        tolerance: relative to the field's value.
        floor: one value per field; smaller values count as large as this.
        most: knots per axis; where they are used up, the rest stays as it is.

    Returns:
        Knots by axis, and values [fields, K_1, ..., K_n].
    """
    knots = [_start(low, high) for low, high in ranges]
    least = np.asarray(floor or [0.0])[:, None]
    for _ in range(_ROUNDS):
        values = _at(function, knots)
        grown = [
            _halve(function, knots, values, axis, tolerance, least, most)
            for axis in range(len(knots))
        ]
        if grown == knots:
            break
        knots = grown
    return [tuple(axis) for axis in knots], _at(function, knots)


def _start(low: int, high: int) -> list[int]:
    powers = [2**n for n in range(high.bit_length()) if low < 2**n < high]
    return sorted({low, *powers, high})


def _at(function: Function, knots: Sequence[Sequence[int]]) -> Array:
    grid = np.meshgrid(*(np.asarray(axis, np.float64) for axis in knots), indexing="ij")
    flat = function([axis.ravel() for axis in grid])
    return flat.reshape(-1, *(len(axis) for axis in knots))


def _halve(
    function: Function,
    knots: Sequence[list[int]],
    values: Array,
    axis: int,
    tolerance: float,
    least: Array,
    most: int,
) -> list[int]:
    """The knots of one axis with the middles of its bad intervals, the worst first."""
    here = knots[axis]
    middles = [(a + b) // 2 for a, b in itertools.pairwise(here) if b - a > 1]
    if not middles or len(here) >= most:
        return here
    others = [middles if place == axis else list(axis_) for place, axis_ in enumerate(knots)]
    wanted = _at(function, others)
    guess = np.stack([on_knots(knots, field, others) for field in values])
    flat = [np.abs(array).reshape(len(array), -1) for array in (guess - wanted, wanted)]
    errors = flat[0] / np.maximum(np.maximum(flat[1], least), np.finfo(np.float64).tiny)
    errors = np.moveaxis(errors.reshape(wanted.shape), axis + 1, -1)
    errors = errors.reshape(-1, len(middles)).max(0)
    worst = sorted(zip(errors, middles, strict=True), reverse=True)[: most - len(here)]
    return sorted({*here, *(middle for error, middle in worst if error > tolerance)})
