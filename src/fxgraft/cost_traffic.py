"""Memory traffic of graph nodes: what is read, written, and kept as state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch.fx import Node

from fxgraft import cost_rules as rules
from fxgraft.kernels.spec import Expr, argument, expr, spec_of
from fxgraft.operators import qualified_name
from fxgraft.program import Program
from fxgraft.symbolic import derived_dimensions, named_symbols

# In-place ops that replace what was there without reading it.
_OVERWRITING = frozenset({
    "copy_", "index_put_", "scatter_", "fill_", "zero_", "index_copy_", "uniform_", "normal_",
})  # fmt: skip
# Those among them that replace some elements only.
_OVERWRITING_PART = frozenset({"index_put_", "scatter_", "index_copy_"})


class Sizes:
    """Sizes of values with dimensions' names, or given numbers, in place of the graph's symbols."""

    def __init__(self, program: Program, symbols: Mapping[str, int]) -> None:
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

    def named(self, size: Expr) -> Any:
        """An expression over the graph's symbols as one over named dimensions."""
        if size not in self._known:
            named = cast(Any, size).xreplace(self._replace)
            self._known[size] = int(named) if named.is_Integer else named
        return self._known[size]


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
        sources = sources[1:]
        gathered = _bytes(node.meta["val"], sizes)
    if qualified_name(node).split("::")[1] in _OVERWRITING:
        sources = sources[1:]
    values = [value for source in sources for value in tensors(source.meta.get("val"))]
    return gathered + sum(_bytes(value, sizes) for value in values)


def bytes_written(node: Node, sizes: Sizes) -> rules.Size:
    """Bytes of outputs."""
    if rules.base_name(node) in rules.ALLOCATIONS:
        return 0
    outputs = tensors(node.meta.get("val"))
    if qualified_name(node).split("::")[1] in _OVERWRITING_PART:
        values = [v for n in node.all_input_nodes[1:] for v in tensors(n.meta.get("val"))]
        outputs = values[-1:]
    return sum(_bytes(value, sizes) for value in outputs)


def state_bytes(node: Node, sizes: Sizes) -> rules.Size:
    """Bytes that a stateful op keeps after this node ran."""
    spec = spec_of(node)
    total: rules.Size = 0
    for state in spec.states if spec and spec.causal(node) else ():
        if state.kind == "fixed":
            total += _bytes(node.meta["val"][state.output], sizes)
            continue
        value = cast(Node, argument(node, state.argument)).meta["val"]
        shape = list(sizes(value))
        limit = argument(node, state.limit) if state.limit else None
        if isinstance(limit, int):
            shape[state.dim] = _least(shape[state.dim], limit - 1)
        total += rules.product(shape) * value.element_size()
    return total


def _least(size: rules.Size, bound: int) -> rules.Size:
    least = cast(Any, sympy.Min(size, bound))
    return int(least) if least.is_Integer else least


def _bytes(value: torch.Tensor, sizes: Sizes) -> rules.Size:
    """Bytes of a tensor in memory; an expanded dimension is there once."""
    pairs = zip(sizes(value), sizes(value.stride()), strict=True)
    stored = [size for size, stride in pairs if stride != 0]
    return rules.product(stored) * value.element_size()
