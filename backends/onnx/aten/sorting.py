"""Sorting, largest elements, counts."""

from __future__ import annotations

from collections.abc import Sequence

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch

from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, translates

aten = torch.ops.aten


@translates(aten.topk.default)
def topk(c: Call) -> Sequence[Value]:
    """The ``k`` largest (or smallest) elements along a dimension and their places."""
    axis, largest = c.axis("dim", "self"), int(bool(c.constant("largest")))
    return _top(c, c.size("k"), axis, largest)


@translates(aten.sort.default, aten.sort.stable)
def sort(c: Call) -> Sequence[Value]:
    """All elements along a dimension in order, and their places; equal ones stay in order."""
    return _sorted(c)


@translates(aten.argsort.default, aten.argsort.stable)
def argsort(c: Call) -> Value:
    """The places of the elements along a dimension in order."""
    return _sorted(c)[1]


def _sorted(c: Call) -> Sequence[Value]:
    axis = c.axis("dim", "self")
    return _top(c, c.dims("self")[axis], axis, int(bool(c.constant("descending"))))


def _top(c: Call, count: sympy.Expr, axis: int, largest: int) -> Sequence[Value]:
    # ``TopK`` gives equal elements in order of their places, which makes it a stable sort.
    given = c.fake("self").dtype
    wide = given if given.is_floating_point or given == torch.int64 else torch.int64
    found, places = c.b.call_many(
        "TopK",
        c.value("self", wide),
        c.b.vector([count]),
        dtypes=[wide, torch.int64],
        axis=axis,
        largest=largest,
    )
    return c.b.cast(found, given), places


@translates(aten.histc.default)
def histogram(c: Call) -> Value:
    """How many elements fall into each of ``bins`` equal ranges from ``min`` to ``max``."""
    bins, low, high = (c.constant(name) for name in ("bins", "min", "max"))
    if low == high:
        raise c.error("a histogram whose range depends on the data")
    wide = torch.float64
    value = c.b.call("Reshape", c.value("self", wide), c.b.integers(-1))
    scaled = c.b.call("Sub", value, c.number(float(low), wide))
    scaled = c.b.call("Mul", scaled, c.number(bins / (high - low), wide))
    place = c.b.call("Floor", scaled)
    # The last range includes its end.
    at_end = c.b.call("Equal", value, c.number(float(high), wide), dtype=torch.bool)
    place = c.b.call("Where", at_end, c.number(float(bins - 1), wide), place, dtype=wide)
    place = c.b.cast(place, torch.int64)
    column = c.b.call("Unsqueeze", place, c.b.integers(1))
    hits = c.b.call("Equal", column, c.b.range(0, bins), dtype=torch.bool)
    counts = c.b.call("ReduceSum", c.b.cast(hits, torch.int64), c.b.integers(0), keepdims=0)
    return c.b.cast(counts, c.dtype)


@translates(aten.bincount.default)
def bincount(c: Call) -> Value:
    """Not expressible without knowing the largest element."""
    raise c.error("the size of its result depends on the data")


@translates(aten.one_hot.default)
def one_hot(c: Call) -> Value:
    """1 at each index, 0 elsewhere."""
    count = c.out_dims[-1]
    column = c.b.unsqueeze(c.value("self"), c.dims("self"), len(c.dims("self")))
    hits = c.b.call("Equal", column, c.b.range(0, count), dtype=torch.bool)
    return c.b.cast(hits, c.dtype)
