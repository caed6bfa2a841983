"""How a Program's nodes read: values with dimension names, labels, references, arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from fxgraft.graph import short_target
from fxgraft.kernels.spec import dims

if TYPE_CHECKING:
    from fxgraft.program import Program

Pieces = tuple[str | Node, ...]
Text = tuple[str, ...]
_INT64_MAX = 2**63 - 1  # how slices say "to the end"
_NUMBER = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


class Describer:
    """Words for the nodes of one Program.

    Symbols are written as the names of the Program's dynamic dimensions, so that the words do
    not depend on how ``torch.export`` numbered them.

    Attributes:
        program: the Program.
        values: each node's value, for example ``float32[batch, sequence, 576]``.
        labels: each call node's short name, unique within its module: ``add`` or ``add#2``.
        modules: call nodes by module path, in graph order.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._dimensions = _dimension_names(program)
        self._unnamed = 0
        self._arguments: dict[Node, dict[str, tuple[Pieces, bool]]] = {}
        self._sizes: dict[Any, str] = {}
        self.values = {node: self._value(node.meta.get("val")) for node in program.graph.nodes}
        self.modules = calls_by_module(program.graph)
        self.labels = _labels(self.modules)

    def size(self, size: int | float | torch.SymInt | torch.SymFloat | torch.SymBool) -> str:
        """A size or symbolic number with dimension names: ``batch*sequence``."""
        if isinstance(size, (int, float)):
            return "max" if size == _INT64_MAX else repr(size)
        expression = cast(Any, size).node.expr
        if expression not in self._sizes:
            symbols: list[Any] = sorted(expression.free_symbols, key=str)
            named = {symbol: self._named(symbol) for symbol in symbols}
            self._sizes[expression] = str(expression.xreplace(named))
        return self._sizes[expression]

    def _named(self, symbol: Any) -> Any:
        """The ``sympy`` symbol under its dimension's name."""
        if symbol not in self._dimensions:
            self._dimensions[symbol] = f"n{self._unnamed}"
            self._unnamed += 1
        return symbol.func(self._dimensions[symbol], **symbol.assumptions0)

    def _value(self, value: object) -> str:
        if isinstance(value, torch.Tensor):
            sizes = ", ".join(self.size(size) for size in value.shape)
            return f"{constant(value.dtype)}[{sizes}]"
        if isinstance(value, (tuple, list)):
            items = cast("tuple[object, ...]", value)
            return f"({', '.join(self._value(item) for item in items)})"
        return self.size(value) if isinstance(value, _NUMBER) else ""

    def is_number(self, node: Node) -> bool:
        """Whether a node's value is a number, which text gives in place of the node."""
        return isinstance(node.meta.get("val"), _NUMBER)

    def reference(self, node: Node) -> str:
        """A node's name in text: a weight's or input's name, else ``module:label``."""
        if node.op in ("get_attr", "placeholder"):
            return str(node.target)
        return f"{module_of(node)}:{self.labels[node]}"

    def arguments(self, node: Node, *, defaults: bool = False) -> dict[str, Pieces]:
        """A call's arguments by schema name.

        Args:
            node: the call.
            defaults: include arguments that equal the schema's default, given or not.
        """
        if node not in self._arguments:
            self._arguments[node] = {
                name: (self.pieces(value), is_default)
                for name, value, is_default in _named_arguments(node)
            }
        found = self._arguments[node]
        return {
            name: text for name, (text, is_default) in found.items() if defaults or not is_default
        }

    def pieces(self, value: object) -> Pieces:
        """An argument as text and, in between, the nodes in it."""
        return tuple(_joined(self._pieces(value)))

    def text(self, pieces: Pieces) -> Text:
        """Pieces as text that alternates between literals (even places) and references (odd)."""
        text = [""]
        for piece in pieces:
            if isinstance(piece, str):
                text[-1] += piece
            else:
                text += [self.reference(piece), ""]
        return tuple(text)

    def _pieces(self, value: object) -> Iterator[str | Node]:
        if isinstance(value, Node):
            yield self.values[value] if self.is_number(value) else value
        elif isinstance(value, (list, tuple)):
            yield "["
            for position, item in enumerate(cast("list[object]", value)):
                yield ", " if position else ""
                yield from self._pieces(item)
            yield "]"
        elif isinstance(value, slice):
            bounds = cast("slice[object, object, object]", value)
            for position, bound in enumerate((bounds.start, bounds.stop, bounds.step)):
                yield ":" if position else ""
                yield from self._pieces(bound)
        elif isinstance(value, _NUMBER):
            yield self.size(value)
        else:
            yield constant(value)


def constant(value: object) -> str:
    """A constant argument: ``float32``, ``None``, ``'tanh'``."""
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, torch.device) else repr(value)


def module_of(node: Node) -> str:
    """Path of the module that a node came from, empty for the top level."""
    return str(node.meta.get("module") or "")


def block_of(module: str) -> str:
    """The numbered module that a module is in: ``model.layers.3`` for ``model.layers.3.mlp.act``.

    A module outside every numbered list is a block of its own.
    """
    parts = module.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return module


def calls_by_module(graph: Graph) -> dict[str, list[Node]]:
    """Call nodes by module path, both in graph order."""
    modules: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            modules.setdefault(module_of(node), []).append(node)
    return modules


def short_name(node: Node) -> str:
    """An operator's name without namespace and overload: ``add`` for ``aten.add.Tensor``."""
    name = short_target(node)
    parts = name.split(".")
    return parts[1] if isinstance(node.target, OpOverload) else parts[-1]


def _dimension_names(program: Program) -> dict[Any, str]:
    """Names of all symbols in the inputs' shapes; inputs may have symbols of their own."""
    return {
        size: name
        for spec, node in zip(program.inputs, program.placeholders, strict=True)
        for name, size in zip(spec.shape, dims(node), strict=True)
        if isinstance(name, str) and size.is_Symbol
    }


def _labels(modules: dict[str, list[Node]]) -> dict[Node, str]:
    labels: dict[Node, str] = {}
    for nodes in modules.values():
        totals = Counter(short_name(node) for node in nodes)
        seen: Counter[str] = Counter()
        for node in nodes:
            name = short_name(node)
            seen[name] += 1
            labels[node] = f"{name}#{seen[name]}" if totals[name] > 1 else name
    return labels


def _named_arguments(node: Node) -> Iterator[tuple[str, object, bool]]:
    """Name, value, and whether the value is the schema's default."""
    if not isinstance(node.target, OpOverload):
        yield from ((str(position), value, False) for position, value in enumerate(node.args))
        yield from ((name, value, False) for name, value in node.kwargs.items())
        return
    positional = list(node.args)
    for argument in cast(Any, node).target._schema.arguments:
        default: object = argument.default_value
        if positional and not argument.kwarg_only:
            value: object = positional.pop(0)
        else:
            value = node.kwargs.get(argument.name, default)
        value = list(cast("list[object]", value)) if isinstance(value, (list, tuple)) else value
        yield argument.name, value, type(value) is type(default) and value == default


def _joined(pieces: Iterable[str | Node]) -> Iterator[str | Node]:
    """Neighbouring literals as one, so that equal arguments have equal pieces."""
    literal = ""
    for piece in pieces:
        if isinstance(piece, str):
            literal += piece
            continue
        if literal:
            yield literal
        literal = ""
        yield piece
    if literal:
        yield literal
