"""One graph node that is being translated, and the table of how each operator is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.backends.onnx.assembler import Assembler
from fxgraft.backends.onnx.builder import Value
from fxgraft.errors import LoweringError
from fxgraft.kernels.spec import dims, expr
from fxgraft.operators import operator_of

Result = Value | Sequence[Value]
Translate = Callable[["Call"], Result]

TABLE: dict[str, Translate] = {}
"""Translations by operator name, for example ``"aten.add.Tensor"``."""


class Context(Protocol):
    """What a translation may ask of the graph around its node."""

    @property
    def is_decode(self) -> bool:
        """Whether the graph is for one new token per row."""
        ...

    def value(self, node: Node) -> Value:
        """The ONNX value of a tensor node."""
        ...

    def inline(
        self,
        call: Call,
        function: Callable[..., Any],
        examples: Mapping[str, Any],
        values: Mapping[str, Value],
        b: Assembler,
    ) -> list[Value]:
        """Trace a function and translate what it does.

        Args:
            call: the node that this stands for; its other arguments are passed as they are.
            function: takes the operator's arguments by keyword.
            examples: fake values of the arguments that are tensors or sizes.
            values: ONNX values of the tensors among them.
            b: what to build.
        """
        ...

    def maximum(self, size: sympy.Expr) -> int | None:
        """The largest value of a size, None if it is unbounded."""
        ...


def translates(*targets: OpOverload | str) -> Callable[[Translate], Translate]:
    """Register a function as the translation of operators, given themselves or by name."""

    def register(function: Translate) -> Translate:
        for target in map(str, targets):
            assert target not in TABLE, f"{target} is translated twice"
            TABLE[target] = function
        return function

    return register


class Call:
    """A node, its arguments by name, and the graph that it is translated into.

    Args:
        node: calls an operator.
        b: the ONNX graph.
        context: gives the values of other nodes.
    """

    def __init__(self, node: Node, b: Assembler, context: Context) -> None:
        self.node, self.b, self.context = node, b, context
        self.arguments = _arguments(node)

    @property
    def result(self) -> Any:
        """The fake value that the node computes."""
        return self.node.meta["val"]

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the (first) result."""
        result: Any = self.result
        first: Tensor = result if isinstance(result, Tensor) else result[0]
        return first.dtype

    @property
    def out_dims(self) -> tuple[sympy.Expr, ...]:
        """Dimensions of the (first) result."""
        return self.dims_of(self.node)

    def nodes(self) -> dict[str, Node]:
        """The arguments that are graph nodes: tensors, and sizes that are not fixed."""
        return {name: item for name, item in self.arguments.items() if isinstance(item, Node)}

    def given(self, name: str) -> bool:
        """Whether an optional argument has a value."""
        return self.arguments.get(name) is not None

    def constant(self, name: str) -> Any:
        """An argument that is no tensor: a number, a string, a list of numbers.

        Raises:
            LoweringError: it is computed from a tensor's size.
        """
        found: Any = _plain(self.arguments.get(name))
        items = cast("list[Any]", found) if isinstance(found, list) else [found]
        if any(isinstance(item, sympy.Expr) for item in items):
            raise self.error(f"its argument {name!r} depends on a dynamic size")
        return cast(Any, found)

    def plain(self, name: str) -> Any:
        """An argument that is no tensor; sizes are expressions."""
        return _plain(self.arguments.get(name))

    def size(self, name: str, default: int = 0) -> sympy.Expr:
        """An integer argument, which may depend on dynamic sizes."""
        found = self.arguments.get(name)
        return cast(sympy.Expr, sympy.sympify(default if found is None else _plain(found)))

    def sizes(self, name: str) -> list[sympy.Expr]:
        """A list of integers, which may depend on dynamic sizes."""
        return [sympy.sympify(_plain(size)) for size in self.arguments[name]]

    def fake(self, name: str) -> Tensor:
        """The fake tensor of an argument."""
        return cast(Node, self.arguments[name]).meta["val"]

    def dims(self, name: str) -> tuple[sympy.Expr, ...]:
        """Dimensions of a tensor argument; none for a number."""
        return self.dims_of(self.arguments.get(name))

    def dims_of(self, item: Any) -> tuple[sympy.Expr, ...]:
        """Dimensions of an item of a list argument; none for a number."""
        if not isinstance(item, Node) or is_size(item):
            return ()
        value = item.meta["val"]
        is_pair = isinstance(value, Tensor) and value.is_complex()
        return (*dims(item), sympy.Integer(2)) if is_pair else dims(item)

    def is_complex(self, name: str) -> bool:
        """Whether an argument is a tensor of complex numbers."""
        found = self.arguments[name]
        return isinstance(found, Node) and not is_size(found) and self.fake(name).is_complex()

    def result_dims(self, place: int) -> tuple[sympy.Expr, ...]:
        """Dimensions of one of several results."""
        return dims(self.result[place])

    def axis(self, name: str, of: str) -> int:
        """A dimension number, counted from the front."""
        return int(self.constant(name)) % max(self.fake(of).dim(), 1)

    def value(self, name: str, dtype: torch.dtype | None = None) -> Value:
        """A tensor argument, or a number as a scalar tensor.

        Args:
            name: of the argument.
            dtype: element type to convert to; needed for numbers.
        """
        return self.as_value(self.arguments[name], dtype)

    def optional(self, name: str, dtype: torch.dtype | None = None) -> Value | None:
        """A tensor argument, None if it is left out."""
        return self.value(name, dtype) if self.given(name) else None

    def values(self, name: str, dtype: torch.dtype | None = None) -> list[Value]:
        """A list of tensors."""
        return [self.as_value(item, dtype) for item in self.arguments[name]]

    def as_value(self, item: Any, dtype: torch.dtype | None = None) -> Value:
        """A node or a number as an ONNX value."""
        if isinstance(item, Node) and isinstance(item.meta["val"], Tensor):
            value = self.context.value(item)
            return self.b.cast(value, dtype) if dtype else value
        number = _plain(item)
        if isinstance(number, sympy.Expr):
            return self.b.cast(self.b.scalar(number), dtype or torch.int64)
        return self.b.constant(number, dtype, "number")

    def number(self, number: float, dtype: torch.dtype | None = None) -> Value:
        """A scalar constant, by default of the result's element type."""
        return self.b.constant(number, dtype or self.dtype, "number")

    def error(self, problem: str, remedy: str = "") -> LoweringError:
        """An error that names the node, its module and source line."""
        where = f"in module {self.node.meta.get('module', '?')!r} at "
        where += str(self.node.meta.get("source", "?"))
        return LoweringError(
            f"node {self.node.name!r} ({graphs.short_target(self.node)}) cannot be written as "
            f"ONNX: {problem}\n  {where}",
            remedy or "run this model with backend 'torch', or rewrite that line of the model",
        )


def _arguments(node: Node) -> dict[str, Any]:
    target = operator_of(node)
    if target is None:
        return {str(place): value for place, value in enumerate(node.args)} | dict(node.kwargs)
    schema = target._schema.arguments
    found: dict[str, Any] = {a.name: a.default_value for a in schema if a.has_default_value()}
    found |= dict(zip((a.name for a in schema), node.args, strict=False))
    return found | dict(node.kwargs)


def _plain(item: Any) -> Any:
    """Arguments without nodes: sizes become expressions."""
    if isinstance(item, Node):
        return _plain(item.meta["val"])
    if isinstance(item, torch.SymInt):
        size = expr(item)
        return int(size) if size.is_Integer else size
    if isinstance(item, (list, tuple)):
        return [_plain(part) for part in cast("list[Any]", item)]
    return item


def is_size(node: Node) -> bool:
    """Whether a node computes a number rather than a tensor."""
    value = node.meta.get("val")
    return not isinstance(value, (Tensor, tuple, list))
