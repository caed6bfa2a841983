"""Memory traffic of graph nodes: what is read, written, and kept as state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch.fx import Node

from fxgraft import cost_rules as rules
from fxgraft.element_types import ElementTypes, Role
from fxgraft.kernels.spec import Expr, argument, expr, spec_of
from fxgraft.operators import operator_of, qualified_name
from fxgraft.program import Program
from fxgraft.symbolic import derived_dimensions, named_symbols

# In-place ops that replace what was there without reading it.
_OVERWRITING = frozenset({
    "copy_", "index_put_", "scatter_", "fill_", "zero_", "index_copy_", "uniform_", "normal_",
})  # fmt: skip
# Those among them that replace some elements only.
_OVERWRITING_PART = frozenset({"index_put_", "scatter_", "index_copy_"})


class Sizes:
    """Sizes of values with dimensions' names, or given numbers, in place of the graph's symbols.

    Args:
        program: whose values.
        symbols: numbers for dimensions.
        types: floating elements count as if of these types; None leaves their own.
    """

    def __init__(
        self, program: Program, symbols: Mapping[str, int], types: ElementTypes | None = None
    ) -> None:
        self._types = types
        self._roles: dict[Node, Role] = {}
        names = named_symbols(program)
        given = {name: sympy.Integer(size) for name, size in symbols.items()}
        self._replace = {symbol: given.get(str(name), name) for symbol, name in names.items()}
        for name, size in derived_dimensions(program).items():
            if name in given and isinstance(size, sympy.Symbol):
                self._replace[size] = given[name]
        self._known: dict[Expr, rules.Size] = {}

    def __call__(self, value: Any) -> rules.Sizes:
        """Sizes of a node, tensor, or sequence of sizes."""
        if isinstance(value, Node):
            value = value.meta["val"]
        if isinstance(value, (tuple, list)) and value and isinstance(value[0], torch.Tensor):
            value = value[0]
        shape = cast(Any, value)
        sizes: list[Any] = list(shape.shape if isinstance(shape, torch.Tensor) else shape)
        return tuple(size if isinstance(size, int) else self.named(expr(size)) for size in sizes)

    def bytes_of(self, value: torch.Tensor, role: Role) -> rules.Size:
        """Bytes of a tensor in memory; an expanded dimension is there once."""
        pairs = zip(self(value), self(value.stride()), strict=True)
        stored = [size for size, stride in pairs if stride != 0]
        return rules.product(stored) * self.element_bytes(value, role)

    def element_bytes(self, value: torch.Tensor, role: Role) -> rules.Size:
        """Bytes of one element; a fraction for types of less than 8 bits."""
        if self._types is None or not value.is_floating_point():
            return value.element_size()
        bits = self._types.bits(role)
        return bits // 8 if bits % 8 == 0 else cast(Any, sympy.Rational(bits, 8))

    def role(self, node: Node) -> Role:
        """What a node's value is: a weight, state of earlier steps, or computed in this step."""
        if node not in self._roles:
            self._roles[node] = self._find_role(node)
        return self._roles[node]

    def _find_role(self, node: Node) -> Role:
        if node.op == "get_attr":
            return "weights"
        if node.op == "placeholder":
            return "state" if is_state_input(node) else "activations"
        if joins_state(node):
            return "state"
        sources = node.all_input_nodes
        if len(sources) == 1 and operator_of(node) is not None and rules.is_view(node, self):
            return self.role(sources[0])
        return "activations"

    def named(self, size: Expr) -> Any:
        """An expression over the graph's symbols as one over named dimensions."""
        if size not in self._known:
            named = cast(Any, size).xreplace(self._replace)
            self._known[size] = int(named) if named.is_Integer else named
        return self._known[size]


def is_state_input(node: Node) -> bool:
    """Whether a node is an input through which a step graph takes state."""
    return node.op == "placeholder" and str(node.target).startswith("past_")


def joins_state(node: Node) -> bool:
    """Whether a node puts new entries behind those of earlier steps."""
    if operator_of(node) is not torch.ops.aten.cat.default:
        return False
    return is_state_input(node.all_input_nodes[0])


def tensors(value: object) -> list[torch.Tensor]:
    """The tensors in a node's value."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = cast("tuple[object, ...]", value) if isinstance(value, (tuple, list)) else ()
    return [item for item in items if isinstance(item, torch.Tensor)]


def bytes_read(node: Node, sizes: Sizes) -> rules.Size:
    """Bytes of inputs and weights, each once; only the gathered rows of a table."""
    name = rules.base_name(node)
    if name in rules.FACTORIES or name in rules.ALLOCATIONS:
        return 0
    sources = list(node.all_input_nodes)
    gathered: rules.Size = 0
    if name in rules.GATHERS:
        table, *sources = sources
        gathered = sizes.bytes_of(node.meta["val"], sizes.role(table))
    if qualified_name(node).split("::")[1] in _OVERWRITING:
        sources = sources[1:]
    return gathered + sum(
        sizes.bytes_of(value, sizes.role(source))
        for source in sources
        for value in tensors(source.meta.get("val"))
    )


def bytes_written(node: Node, sizes: Sizes) -> rules.Size:
    """Bytes of outputs."""
    if rules.base_name(node) in rules.ALLOCATIONS:
        return 0
    outputs = tensors(node.meta.get("val"))
    if qualified_name(node).split("::")[1] in _OVERWRITING_PART:
        values = [v for n in node.all_input_nodes[1:] for v in tensors(n.meta.get("val"))]
        outputs = values[-1:]
    spec = spec_of(node)
    fixed = {state.output for state in spec.states if state.kind == "fixed"} if spec else set[int]()
    written = "state" if joins_state(node) else "activations"
    return sum(
        sizes.bytes_of(value, "state" if place in fixed else written)
        for place, value in enumerate(outputs)
    )


def state_bytes(node: Node, sizes: Sizes) -> rules.Size:
    """Bytes that a stateful op keeps after this node ran."""
    spec = spec_of(node)
    total: rules.Size = 0
    for state in spec.states if spec and spec.causal(node) else ():
        if state.kind == "fixed":
            total += sizes.bytes_of(node.meta["val"][state.output], "state")
            continue
        value = cast(Node, argument(node, state.argument)).meta["val"]
        shape = list(sizes(value))
        limit = argument(node, state.limit) if state.limit else None
        if isinstance(limit, int):
            shape[state.dim] = _least(shape[state.dim], limit - 1)
        total += rules.product(shape) * sizes.element_bytes(value, "state")
    return total


def _least(size: rules.Size, bound: int) -> rules.Size:
    least = cast(Any, sympy.Min(size, bound))
    return int(least) if least.is_Integer else least
