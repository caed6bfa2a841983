"""Graphs of functions: op references, and operators taken apart into simpler ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from fxgraft import graph as graphs
from fxgraft.kernels.spec import expr
from fxgraft.operators import operator_of

Values = Sequence[Any]


def trace(node: Node, function: Callable[..., Any], examples: Values) -> GraphModule:
    """The graph of ``function`` on fake values of the graph that ``node`` is in."""
    with graphs.fake_mode(node.graph), torch.no_grad():
        traced = cast(Any, make_fx)(function)(*map(_own, examples))
    return spell_out_sizes(traced)


def take_apart(node: Node) -> GraphModule | None:
    """The graph of what an operator does in terms of simpler ones; None if it is simple."""
    inputs = node.all_input_nodes

    def call(*values: Any) -> Any:
        table = dict(zip(inputs, values, strict=True))
        args = map_arg(node.args, lambda n: table[n])
        kwargs = map_arg(node.kwargs, lambda n: table[n])
        return operator_of(node)(*args, **kwargs)

    with graphs.fake_mode(node.graph), torch.no_grad():
        examples = [_own(source.meta["val"]) for source in inputs]
        traced = make_fx(call, decomposition_table=_decompositions())(*examples)
    if any(inner.target is node.target for inner in traced.graph.nodes):
        return None
    return spell_out_sizes(traced)


def spell_out_sizes(module: GraphModule) -> GraphModule:
    """Replace ``aten.size``, which gives a whole shape, by its sizes; torch 2.11 traces it."""
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.size.default):
        source = cast(Node, node.args[0])
        with module.graph.inserting_after(node):
            sizes = [_size(source, axis) for axis in range(source.meta["val"].dim())]
        for user in list(node.users):
            if user.target is operator.getitem:
                picked = sizes[cast(int, user.args[1])]
                for reader in list(user.users):
                    reader.args = map_arg(reader.args, _swap(user, picked))
                    reader.kwargs = map_arg(reader.kwargs, _swap(user, picked))
            else:
                user.args = map_arg(user.args, _swap(node, sizes))
                user.kwargs = map_arg(user.kwargs, _swap(node, sizes))
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _size(source: Node, axis: int) -> Any:
    """A dimension of a node: a number, or a node where it is symbolic."""
    value = source.meta["val"].shape[axis]
    if isinstance(value, int):
        return value
    size = source.graph.call_function(torch.ops.aten.sym_size.int, (source, axis))
    size.meta = {"val": value}
    return size


def _swap(old: Node, new: Any) -> Callable[[Node], Any]:
    return lambda node: new if node is old else node


def _own(example: Any) -> Any:
    """A fake tensor of its own: nodes may share one, which tracing would take for one input."""
    return example if not isinstance(example, Tensor) else torch.empty_like(example)


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    return {**core_aten_decompositions()}


def signature(value: Any) -> Hashable:
    """Equal for values on which a function traces to the same graph."""
    if isinstance(value, Node):
        return signature(value.meta["val"])
    if isinstance(value, Tensor):
        return (tuple(expr(size) for size in value.shape), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(signature, cast("Sequence[Any]", value)))
    if isinstance(value, torch.SymInt):
        return expr(value)
    return (type(value).__name__, repr(value))
