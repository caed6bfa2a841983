"""Graphs of functions: op references, and operators taken apart into simpler ones."""

from __future__ import annotations

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
        return cast(Any, make_fx)(function)(*map(_own, examples))


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
    return traced


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
