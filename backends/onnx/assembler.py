"""A Builder that knows sizes: symbolic dimensions, reshapes, transposes, casts.

Rules, applied as nodes are built:

1. A size is computed from the graph's inputs, once.
2. A reshape of a reshape is one reshape; one that changes nothing is none.
3. A transpose that only moves dimensions of size 1 is a reshape, one of a constant is none.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch.utils._sympy import functions as symbolic

from fxgraft.backends.onnx.builder import Builder, Value
from fxgraft.backends.onnx.types import element_type, stored_dtype
from fxgraft.errors import Error

Dims = Sequence[sympy.Expr]
ZERO = cast(sympy.Expr, sympy.Integer(0))
ONE = cast(sympy.Expr, sympy.Integer(1))
# Operators of sizes whose operands may change places, and those whose may not.
_SORTED: dict[type, str] = {
    sympy.Add: "Add",
    sympy.Mul: "Mul",
    sympy.Max: "Max",
    sympy.Min: "Min",
    symbolic.Max: "Max",
    symbolic.Min: "Min",
}
_ORDERED: dict[type, str] = {
    symbolic.FloorDiv: "Div",
    symbolic.CleanDiv: "Div",
    symbolic.Mod: "Mod",
    symbolic.PythonMod: "Mod",
}
# Fixed tables of more elements are computed when the model runs.
_LARGEST_CONSTANT = 65536
_END = torch.iinfo(torch.int64).max


@dataclass(eq=False)
class Assembler(Builder):
    """See the module's docstring.

    Attributes:
        symbols: where to read each symbolic dimension: a value and its axis, None if the value
            is the number itself.
    """

    symbols: dict[sympy.Symbol, tuple[Value, int | None]] = field(
        default_factory=dict[sympy.Symbol, "tuple[Value, int | None]"]
    )
    _reshaped: dict[Value, tuple[Value, tuple[sympy.Expr, ...]]] = field(
        default_factory=dict[Value, "tuple[Value, tuple[sympy.Expr, ...]]"]
    )

    def body(self) -> Assembler:
        """A builder for a graph inside this one."""
        return replace(self, parent=self, nodes=[], ops=set(), _known={}, _reshaped={})

    def note_sizes(self, value: Value, dims: Dims) -> None:
        """Remember where symbolic dimensions can be read: from inputs, else the latest value."""
        for axis, size in enumerate(dims):
            if isinstance(size, sympy.Symbol) and not self._is_read_from_input(size):
                self.symbols[size] = (value, axis)

    def _is_read_from_input(self, size: sympy.Symbol) -> bool:
        known = self.symbols.get(size)
        return known is not None and known[0].producer is None

    def vector(self, sizes: Dims) -> Value:
        """Sizes as an int64 vector."""
        if all(size.is_Integer for size in sizes):
            return self.integers(*map(int, sizes))
        if len(sizes) == 1:
            return self._one(sizes[0])
        return self.call("Concat", *map(self._one, sizes), dtype=torch.int64, axis=0)

    def scalar(self, size: sympy.Expr) -> Value:
        """A size as an int64 scalar."""
        if size.is_Integer:
            return self.constant(int(size), torch.int64, "integer")
        return self.call("Squeeze", self._one(size), self.integers(0))

    def _one(self, size: sympy.Basic) -> Value:
        """A size as a vector of one entry."""
        if isinstance(size, sympy.Integer):
            return self.integers(int(size))
        if isinstance(size, sympy.Symbol) and size in self.symbols:
            return self._read(*self.symbols[size])
        if isinstance(size, sympy.Pow) and isinstance(size.exp, sympy.Integer) and size.exp > 0:
            return self._chain("Mul", [size.base] * int(size.exp))
        if type(size) in _SORTED:
            return self._chain(_SORTED[type(size)], sorted(size.args, key=str))
        if type(size) in _ORDERED:
            return self._chain(_ORDERED[type(size)], size.args)
        raise Error(
            f"the size {size} cannot be computed from the inputs' shapes",
            "give that dimension a fixed size, or avoid this shape arithmetic",
        )

    def _read(self, value: Value, axis: int | None) -> Value:
        if axis is None:
            return self.call("Reshape", value, self.integers(1))
        return self.call("Shape", value, dtype=torch.int64, start=axis, end=axis + 1)

    def _chain(self, op: str, sizes: Iterable[sympy.Basic]) -> Value:
        return reduce(lambda left, right: self.call(op, left, right), map(self._one, sizes))

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """``value`` with another element type."""
        if value.dtype == stored_dtype(dtype):
            return value
        return self.call("Cast", value, dtype=dtype, to=element_type(dtype))

    def reshape(self, value: Value, source: Dims, target: Dims) -> Value:
        """Reshape from the dimensions ``source`` to ``target``."""
        value, source = self._reshaped.get(value, (value, tuple(source)))
        if tuple(source) == tuple(target):
            return value
        if value.constant is not None and _are_numbers(target):
            shaped = value.constant.reshape([int(size) for size in target])
            return self.constant(shaped, value.dtype, f"{value.name}.reshaped")
        shape = _reshape_numbers(source, target)
        sizes = self.vector(target) if shape is None else self.integers(*shape)
        empty = 1 if ZERO in target else None
        result = self.call("Reshape", value, sizes, allowzero=empty)
        self._reshaped[result] = (value, tuple(source))
        return result

    def transpose(self, value: Value, dims: Dims, order: Sequence[int]) -> Value:
        """Reorder the dimensions ``dims`` of a value."""
        order = [axis % len(dims) for axis in order]
        moved = [axis for axis in order if dims[axis] != 1]
        if moved == sorted(moved):
            return self.reshape(value, dims, [dims[axis] for axis in order])
        if value.constant is not None:
            turned = value.constant.permute(order)
            return self.constant(turned, value.dtype, f"{value.name}.transposed")
        producer = value.producer
        if producer is not None and producer.op == "Transpose" and producer.inputs[0] is not None:
            inner = producer.attributes["perm"]
            assert isinstance(inner, tuple)
            order = [int(inner[axis]) for axis in order]
            if order == sorted(order):
                return producer.inputs[0]
            return self.call("Transpose", producer.inputs[0], perm=tuple(order))
        return self.call("Transpose", value, perm=tuple(order))

    def unsqueeze(self, value: Value, dims: Dims, *axes: int) -> Value:
        """Insert dimensions of size 1 at these places of the result."""
        target = list(dims)
        for axis in sorted(axis % (len(dims) + len(axes)) for axis in axes):
            target.insert(axis, ONE)
        if _reshape_numbers(dims, target) is not None:
            return self.reshape(value, dims, target)
        return self.call("Unsqueeze", value, self.integers(*axes))

    def squeeze(self, value: Value, dims: Dims, *axes: int) -> Value:
        """Drop these dimensions, which are 1."""
        target = [size for axis, size in enumerate(dims) if axis not in axes]
        if _reshape_numbers(dims, target) is not None:
            return self.reshape(value, dims, target)
        return self.call("Squeeze", value, self.integers(*axes))

    def full(self, dims: Dims, number: float, dtype: torch.dtype) -> Value:
        """A tensor that holds one number everywhere."""
        dtype = stored_dtype(dtype)
        if _are_numbers(dims) and math.prod(map(int, dims)) <= _LARGEST_CONSTANT:
            return self.constant(torch.full([int(size) for size in dims], number, dtype=dtype))
        return self.expand(self.constant(number, dtype, "number"), (), dims)

    def expand(self, value: Value, source: Dims, target: Dims) -> Value:
        """Broadcast to the dimensions ``target``."""
        if tuple(source) == tuple(target):
            return value
        return self.call("Expand", value, self.vector(target))

    def slice(
        self, value: Value, axis: int, start: sympy.Expr | int, end: sympy.Expr | int, step: int = 1
    ) -> Value:
        """Entries ``start`` to ``end`` along an axis; negative ones count from the end."""
        start, end = sympy.sympify(start), sympy.sympify(end)
        if start == 0 and end.is_Integer and end >= _END and step == 1:
            return value
        places = (self.vector([start]), self.vector([end]))
        steps = self.integers(step) if step != 1 else None
        return self.call("Slice", value, *places, self.integers(axis), steps)

    def range(self, start: sympy.Expr | int, end: sympy.Expr | int) -> Value:
        """The integers from ``start`` to ``end`` - 1."""
        start, end = sympy.sympify(start), sympy.sympify(end)
        if start.is_Integer and end.is_Integer:
            return self.constant(torch.arange(int(start), int(end)), name="range")
        return self.call("Range", *map(self.scalar, (start, end)), self.scalar(ONE))


def product(sizes: Iterable[sympy.Expr]) -> sympy.Expr:
    """The product of sizes."""
    return reduce(operator.mul, sizes, ONE)


def _are_numbers(dims: Dims) -> bool:
    return all(size.is_Integer for size in dims)


def _reshape_numbers(source: Dims, target: Dims) -> list[int] | None:
    """``Reshape``'s shape as constants: 0 keeps a dimension, -1 is what is left; None if neither
    is enough."""
    numbers: list[int] = []
    for axis, size in enumerate(target):
        if size.is_Integer:
            numbers.append(int(size))
        elif axis < len(source) and source[axis] == size:
            numbers.append(0)
        else:
            numbers.append(-1)
    # A static 0 would be read as "keep".
    if numbers.count(-1) > 1 or ZERO in target:
        return None
    return numbers
