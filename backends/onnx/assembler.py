"""A Builder that knows sizes: symbolic dimensions, reshapes, transposes, casts.

Rules, applied as nodes are built:

1. A size is computed from the graph's inputs, once.
2. A reshape of a reshape is one reshape; one that changes nothing is none.
3. A transpose that only moves dimensions of size 1 is a reshape, one of a constant is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import sympy
import torch
from torch import Tensor
from torch.utils._sympy import functions as symbolic

from fxgraft.backends.onnx.builder import Builder, Value
from fxgraft.backends.onnx.types import element_type, stored_dtype
from fxgraft.errors import LoweringError

Dims = Sequence[sympy.Expr]
_OPERATORS: dict[type, str] = {
    sympy.Add: "Add",
    sympy.Mul: "Mul",
    sympy.Max: "Max",
    sympy.Min: "Min",
    symbolic.Max: "Max",
    symbolic.Min: "Min",
    symbolic.FloorDiv: "Div",
    symbolic.CleanDiv: "Div",
    symbolic.Mod: "Mod",
    symbolic.PythonMod: "Mod",
}
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
        """Remember where symbolic dimensions can be read."""
        for axis, size in enumerate(dims):
            if isinstance(size, sympy.Symbol):
                self.symbols.setdefault(size, (value, axis))

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

    def _one(self, size: sympy.Expr) -> Value:
        if size.is_Integer:
            return self.integers(int(size))
        if isinstance(size, sympy.Symbol) and size in self.symbols:
            value, axis = self.symbols[size]
            if axis is None:
                return self.call("Reshape", value, self.integers(1), dtype=torch.int64)
            return self.call("Shape", value, dtype=torch.int64, start=axis, end=axis + 1)
        if isinstance(size, sympy.Pow) and size.exp.is_Integer and size.exp > 0:
            return reduce(self._times, [self._one(size.base)] * int(size.exp))
        operator = _OPERATORS.get(type(size))
        if operator is None:
            raise LoweringError(
                f"the size {size} cannot be computed from the inputs' shapes",
                "give that dimension a fixed size, or avoid this shape arithmetic",
            )
        parts = [self._one(part) for part in sorted(size.args, key=str)] \
            if operator in ("Add", "Mul", "Max", "Min") else [self._one(part) for part in size.args]
        return reduce(lambda left, right: self.call(operator, left, right), parts)

    def _times(self, left: Value, right: Value) -> Value:
        return self.call("Mul", left, right)

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
            return self._rearranged(value, value.constant.reshape([int(size) for size in target]))
        shape = _reshape_numbers(source, target)
        sizes = self.vector(target) if shape is None else self.integers(*shape)
        result = self.call("Reshape", value, sizes)
        self._reshaped[result] = (value, tuple(source))
        return result

    def transpose(self, value: Value, dims: Dims, order: Sequence[int]) -> Value:
        """Reorder the dimensions ``dims`` of a value."""
        order = [axis % len(dims) for axis in order]
        moved = [axis for axis in order if dims[axis] != 1]
        if moved == sorted(moved):
            return self.reshape(value, dims, [dims[axis] for axis in order])
        if value.constant is not None:
            return self._rearranged(value, value.constant.permute(order))
        producer = value.producer
        if producer is not None and producer.op == "Transpose" and producer.inputs[0] is not None:
            inner = producer.attributes["perm"]
            assert isinstance(inner, tuple)
            order = [int(inner[axis]) for axis in order]
            if order == sorted(order):
                return producer.inputs[0]
            return self.call("Transpose", producer.inputs[0], perm=tuple(order))
        return self.call("Transpose", value, perm=tuple(order))

    def _rearranged(self, value: Value, tensor: Tensor) -> Value:
        return self.constant(tensor, value.dtype, f"{value.name}.rearranged")

    def unsqueeze(self, value: Value, dims: Dims, *axes: int) -> Value:
        """Insert dimensions of size 1 at these places of the result."""
        target = list(dims)
        for axis in sorted(axis % (len(dims) + len(axes)) for axis in axes):
            target.insert(axis, sympy.Integer(1))
        if _reshape_numbers(dims, target) is not None:
            return self.reshape(value, dims, target)
        return self.call("Unsqueeze", value, self.integers(*axes))

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
        return self.call("Range", *map(self.scalar, (start, end)), self.scalar(sympy.Integer(1)))


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
    if numbers.count(-1) > 1 or any(size == 0 for size in target):
        return None
    return numbers
