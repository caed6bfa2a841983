"""Builds an ONNX graph node by node; equal nodes are built once.

A node is recognised by operator, inputs and attributes, so masks, position tables and sizes that
every layer asks for exist once, without a pass over the graph afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from fxgraft.backends.onnx.types import stored_dtype

# Constants of at most this many elements are told apart by what they hold.
_SMALL = 65536


@dataclass(eq=False, slots=True)
class Value:
    """One tensor of an ONNX graph.

    Attributes:
        name: unique in the model.
        dtype: element type; None where nothing depends on it.
        scope: the builder whose graph it belongs to.
        producer: the node that computes it; None for inputs and constants.
        constant: its data, if it is a constant.
        shape: of a body's input, where its rank must be told; None for other values.
    """

    name: str
    dtype: torch.dtype | None
    scope: Builder
    producer: OnnxNode | None = None
    constant: Tensor | None = None
    shape: tuple[int | str, ...] | None = None


@dataclass(frozen=True, eq=False)
class Body:
    """A graph that is an attribute of a node, such as the body of a Scan."""

    builder: Builder
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


Attribute = int | float | str | tuple[int, ...] | tuple[float, ...] | Body


@dataclass(eq=False, slots=True)
class OnnxNode:
    """One call of an ONNX operator.

    Attributes:
        op: the operator.
        inputs: None for optional ones that are left out.
        attributes: by name.
        outputs: in order.
        origin: module path of the graph node it was translated from.
    """

    op: str
    inputs: tuple[Value | None, ...]
    attributes: Mapping[str, Attribute]
    outputs: tuple[Value, ...]
    origin: str


@dataclass(eq=False)
class Builder:
    """An ONNX graph under construction.

    Attributes:
        opset: ONNX opset whose operators are used.
        parent: the builder of the graph around a body. Nodes of a body that only read values from
            outside are built outside, so that they do not run once per iteration.
        nodes: in an order in which they can run.
        constants: in order of first use.
        origin: module path that new nodes are marked with.
        ops: operators of the nodes that were asked for since it was last cleared.
    """

    opset: int
    parent: Builder | None = None
    nodes: list[OnnxNode] = field(default_factory=list[OnnxNode])
    origin: str = ""
    ops: set[str] = field(default_factory=set[str])
    _known: dict[Hashable, tuple[Value, ...]] = field(
        default_factory=dict[Hashable, tuple[Value, ...]]
    )
    _constants: dict[Hashable, Value] = field(default_factory=dict[Hashable, Value])
    _names: set[str] = field(default_factory=set[str])
    _numbers: count[int] = field(default_factory=count)

    @property
    def root(self) -> Builder:
        """The builder of the whole model."""
        return self if self.parent is None else self.parent.root

    @property
    def constants(self) -> list[Value]:
        """All constants of the model."""
        return list(self.root._constants.values())

    def input(
        self,
        dtype: torch.dtype | None,
        name: str = "item",
        shape: tuple[int | str, ...] | None = None,
    ) -> Value:
        """An input of this graph."""
        return Value(self._name(name), dtype and stored_dtype(dtype), self, shape=shape)

    def constant(
        self,
        data: Tensor | Sequence[float] | float,
        dtype: torch.dtype | None = None,
        name: str = "constant",
    ) -> Value:
        """A constant; equal ones exist once.

        Args:
            data: its values; Python numbers need a dtype.
            dtype: element type, default that of ``data``.
            name: a readable name, used if it is free.
        """
        tensor = data if isinstance(data, Tensor) else torch.tensor(data, dtype=dtype)
        wanted = stored_dtype(dtype or tensor.dtype)
        tensor = tensor.detach()
        tensor = tensor.to(wanted) if tensor.numel() <= _SMALL else tensor
        root = self.root
        key = (identity(tensor), wanted)
        if key not in root._constants:
            root._constants[key] = Value(self._name(name), wanted, root, constant=tensor)
        return root._constants[key]

    def integers(self, *numbers: int) -> Value:
        """A constant int64 vector."""
        return self.constant(numbers, torch.int64, "integers")

    def call(
        self,
        op: str,
        *inputs: Value | None,
        dtype: torch.dtype | None = None,
        **attributes: Attribute | None,
    ) -> Value:
        """Build a node with one output.

        Args:
            op: ONNX operator.
            inputs: in order; None for one that is left out.
            dtype: element type of the output, default that of the first input.
            attributes: of the operator; those that are None are left out.
        """
        first = inputs[0].dtype if inputs and inputs[0] is not None else None
        return self.call_many(op, *inputs, dtypes=(dtype or first,), **attributes)[0]

    def call_many(
        self,
        op: str,
        *inputs: Value | None,
        dtypes: Sequence[torch.dtype | None],
        **attributes: Attribute | None,
    ) -> tuple[Value, ...]:
        """Build a node with one output per entry of ``dtypes``."""
        given = {name: value for name, value in attributes.items() if value is not None}
        home = self._home(inputs, given)
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        key = (op, inputs, tuple(sorted(given.items())), len(dtypes))
        self.root.ops.add(op)
        if key not in home._known:
            home._known[key] = home._add(op, inputs, given, dtypes)
        return home._known[key]

    def _home(self, inputs: Sequence[Value | None], attributes: Mapping[str, Attribute]) -> Builder:
        """The outermost builder in which all inputs are known."""
        home = self
        if any(isinstance(value, Body) for value in attributes.values()):
            return home
        scopes = {id(value.scope) for value in inputs if value is not None}
        while home.parent is not None and id(home) not in scopes:
            home = home.parent
        return home

    def _add(
        self,
        op: str,
        inputs: tuple[Value | None, ...],
        attributes: Mapping[str, Attribute],
        dtypes: Sequence[torch.dtype | None],
    ) -> tuple[Value, ...]:
        outputs = tuple(
            Value(self._name(op), dtype and stored_dtype(dtype), self) for dtype in dtypes
        )
        node = OnnxNode(op, inputs, attributes, outputs, self.root.origin)
        for output in outputs:
            output.producer = node
        self.nodes.append(node)
        return outputs

    def outputs(self, values: Sequence[Value], names: Sequence[str] = ()) -> tuple[Value, ...]:
        """Values that may be this graph's outputs: each computed by a node of it, none twice.

        Args:
            values: the outputs.
            names: what they are to be called, default as they are.
        """
        found: list[Value] = []
        for value in values:
            mine = value.producer is not None and value.scope is self
            if not mine or value in found:
                value = self._add("Identity", (value,), {}, (value.dtype,))[0]
            found.append(value)
        for value, name in zip(found, names, strict=False):
            self.claim(value, name)
        return tuple(found)

    def reserve(self, name: str) -> None:
        """Keep a name for an output."""
        self.root._names.add(name)

    def claim(self, value: Value, name: str) -> None:
        """Give an output the name that was reserved for it."""
        value.name = name

    def _name(self, wanted: str) -> str:
        root = self.root
        name = wanted
        while name in root._names:
            name = f"{wanted}_{next(root._numbers)}"
        root._names.add(name)
        return name


def identity(tensor: Tensor) -> Hashable:
    """Equal for tensors that hold the same: small ones by content, others by memory."""
    if tensor.numel() <= _SMALL:
        data = tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor
        digest = hashlib.blake2b(data.numpy().tobytes()).digest()
        return ("content", digest, tuple(tensor.shape), tensor.dtype)
    return ("memory", tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
