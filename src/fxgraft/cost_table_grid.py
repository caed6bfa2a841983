"""Multilinear interpolation on grids of knots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Indices = np.ndarray[tuple[int, ...], np.dtype[np.intp]]
Knots = Sequence[int]


def interpolate(knots: Sequence[Knots], values: Array, points: Sequence[Array]) -> Array:
    """Interpolate linearly along every axis; outside the knots the nearest value holds.

    Args:
        knots: strictly increasing, one sequence per axis.
        values: [K_1, ..., K_n] at the knots.
        points: one array per axis, all of the same shape [...].

    Returns:
        float64 [...].
    """
    shape = points[0].shape if points else ()
    result = np.zeros(shape)
    places = [_place(np.asarray(k, np.float64), p) for k, p in zip(knots, points, strict=True)]
    for corner in range(2 ** len(knots)):
        weight = np.ones(shape)
        index: list[Indices] = []
        for axis, (low, high, fraction) in enumerate(places):
            upper = bool(corner >> axis & 1)
            weight = weight * (fraction if upper else 1.0 - fraction)
            index.append(high if upper else low)
        result = result + weight * values[tuple(index)]
    return result


def _place(knots: Array, points: Array) -> tuple[Indices, Indices, Array]:
    """Indices of the knots around each point, and how far it is from the lower one."""
    last = len(knots) - 1
    if last == 0:
        zero = np.zeros(points.shape, np.intp)
        return zero, zero, np.zeros(points.shape)
    low = np.clip(np.searchsorted(knots, points, side="right") - 1, 0, last - 1)
    fraction = (points - knots[low]) / (knots[low + 1] - knots[low])
    return low, low + 1, np.clip(fraction, 0.0, 1.0)


def on_knots(knots: Sequence[Knots], values: Array, others: Sequence[Knots]) -> Array:
    """The interpolated function at the crossings of other knots, [L_1, ..., L_n]."""
    points = np.meshgrid(*(np.asarray(k, np.float64) for k in others), indexing="ij")
    return interpolate(knots, values, list(points))


def common_knots(all_knots: Sequence[Knots], low: int, high: int) -> tuple[int, ...]:
    """All knots inside a range, and its two ends."""
    inside = {knot for knots in all_knots for knot in knots if low < knot < high}
    return tuple(sorted(inside | {low, high}))
