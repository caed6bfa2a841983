"""Builds an ONNX graph node by node; equal nodes are built once.

A node is recognised by operator, inputs and attributes, so masks, position tables and sizes that
every layer asks for exist once without a pass afterwards. Consecutive reshapes and transposes
are joined as they are built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import sympy
import torch
from torch import Tensor

Expr = sympy.Expr
Attribute = "int | float | str | tuple[int, ...] | tuple[float, ...] | Body"

# onnxruntime's CPU provider has no bfloat16 arithmetic; float32 holds every bfloat16 value.
_STAND_INS = {torch.bfloat16: torch.float32}


@dataclass(eq=False, slots=True)
class Value:
    """One tensor of an ONNX graph.

    Attributes:
        name: unique in the model.
        dtype: element type, None where nothing depends on it.
        scope: the builder whose graph the value belongs to.
        producer: the node that computes it; None for inputs and constants.
        constant: its data, if known while building.
    """

    name: str
    dtype: torch.dtype | None
    scope: Builder
    producer: OnnxNode | None = None
    constant: Tensor | None = None


@dataclass(eq=False, slots=True)
class OnnxNode:
    """One ONNX operator call."""

    op: str
    inputs: tuple[Value | None, ...]
    attributes: Mapping[str, object]
    outputs: tuple[Value, ...]
    origin: str = ""


@dataclass(frozen=True, eq=False)
class Body:
    """A graph that is an attribute of a node, such as the body of a Scan."""

    builder: Builder
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(eq=False)
class Builder:
    """An ONNX graph under construction.

    Args:
        opset: ONNX opset whose operators are used.
        parent: the builder of the graph around a body. Nodes of a body that only read values
            from outside are built outside, once.

    Attributes:
        nodes: in an order in which they can run.
        origin: name of the graph node that is being translated.
    """

    opset: int
    parent: Builder | None = None
    nodes: list[OnnxNode] = field(default_factory=list[OnnxNode])
    origin: str = ""
    _known: dict[object, tuple[Value, ...]] = field(
        default_factory=dict[object, tuple[Value, ...]]
    )
    _constants: dict[object, Value] = field(default_factory=dict[object, Value])
    _reshaped: dict[Value, tuple[Value, tuple[Expr, ...]]] = field(
        default_factory=dict[Value, "tuple[Value, tuple[Expr, ...]]"]
    )
    _numbers: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        if self.parent is not None:
            self._numbers = self.parent._numbers

    @property
    def root(self) -> Builder:
        """The builder of the whole model."""
        return self if self.parent is None else self.parent.root

    def input(self, name: str, dtype: torch.dtype) -> Value:
        """A graph input."""
        return Value(name, stored_dtype(dtype), self)

    def body_input(self, dtype: torch.dtype | None) -> Value:
        """An input of a body, with a name of its own."""
        return Value(f"item_{next(self._numbers)}", dtype, self)

    def constant(self, data: Tensor | np.ndarray | Sequence[int] | float, dtype: torch.dtype | None = None) -> Value:
        """A constant; equal small ones and views of one weight exist once.

        Args:
            data: values; Python numbers need a dtype.
            dtype: element type, default that of ``data``.
        """
        if self.parent is not None:
            return self.parent.constant(data, dtype)
        tensor = data if isinstance(data, Tensor) else torch.as_tensor(data, dtype=dtype)
        tensor = tensor.detach()
        wanted = stored_dtype(dtype or tensor.dtype)
        if tensor.numel() <= SMALL:
            tensor = tensor.to(wanted)
        key = (identity(tensor), wanted)
        if key not in self._constants:
            name = f"constant_{next(self._numbers)}"
            self._constants[key] = Value(name, wanted, self, constant=tensor)
        return self._constants[key]

    def integers(self, *numbers: int) -> Value:
        """A constant int64 vector."""
        return self.constant(list(numbers), torch.int64)

    def rename(self, value: Value, name: str) -> None:
        """Give a constant a readable name, if it has none yet and the name is free."""
        if value.name.startswith("constant_") and value.constant is not None:
            taken = {known.name for known in self.root._constants.values()}
            if name not in taken:
                value.name = name

    def call(
        self, op: str, *inputs: Value | None, dtype: torch.dtype | None = None, **attributes: object
    ) -> Value:
        """Build a node with one output.

        Args:
            op: ONNX operator.
            inputs: trailing ones that are None are left out.
            dtype: element type of the output, default that of the first input.
            attributes: numbers, strings, lists of numbers, or a ``Body``.
        """
        first = inputs[0].dtype if inputs and inputs[0] is not None else None
        return self.call_many(op, *inputs, dtypes=(dtype or first,), **attributes)[0]

    def call_many(
        self,
        op: str,
        *inputs: Value | None,
        dtypes: Sequence[torch.dtype | None],
        **attributes: object,
    ) -> tuple[Value, ...]:
        """Build a node with one output per entry of ``dtypes``."""
        if self.parent is not None and not any(v and v.scope is self for v in inputs):
            if not any(isinstance(a, Body) for a in attributes.values()):
                return self.parent.call_many(op, *inputs, dtypes=dtypes, **attributes)
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        frozen = {k: tuple(a) if isinstance(a, list) else a for k, a in attributes.items() if a is not None}
        key = (op, inputs, len(dtypes), tuple(sorted(frozen.items(), key=lambda item: item[0])))
        if key not in self._known:
            self._known[key] = self._add(op, inputs, dtypes, frozen)
        return self._known[key]

    def _add(self, op, inputs, dtypes, attributes):
        outputs = tuple(
            Value(f"{op}_{next(self._numbers)}", dtype and stored_dtype(dtype), self) for dtype in dtypes
        )
        node = OnnxNode(op, inputs, attributes, outputs, self.root.origin)
        for output in outputs:
            output.producer = node
        self.nodes.append(node)
        return outputs
