"""Rewrites that let Inductor generate good CPU code for the decode step.

They apply to graphs that are about to be compiled, never to a Program that a user sees:

1. A linear layer over one row becomes a multiplication and a sum, which Inductor fuses with its
   neighbours and runs at memory speed; a library matrix product of one row does not.
2. fxgraft ops become their references, so that nothing is opaque; attention of one query has a
   form of its own without matrix products.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxgraft import graph as graphs
from fxgraft.kernels.spec import argument, dims, spec_of
from fxgraft.tracing import trace

aten = torch.ops.aten


def decompose(module: GraphModule) -> None:
    """Apply the rewrites in place."""
    for node in list(module.graph.nodes):
        if node.target is aten.linear.default:
            _one_row_linear(node)
        elif node.target is torch.ops.fxgraft.attention.default and _is_plain_decode(node):
            _one_query_attention(node)
        elif (spec := spec_of(node)) is not None and not spec.states:
            _inline(node, spec.reference)


def _replace(node: Node, value: Node) -> None:
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def _one_row_linear(node: Node) -> None:
    x, weight = node.args[0], node.args[1]
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    *rows, width = dims(x)
    if math.prod(int(size) if size.is_Integer else 0 for size in rows) != 1:  # pyright: ignore[reportArgumentType]
        return

    def call(target: Any, *args: Any) -> Node:
        return graphs.insert(node, target, args)

    row = call(aten.reshape.default, x, [1, int(width)])  # pyright: ignore[reportArgumentType]
    result = call(aten.sum.dim_IntList, call(aten.mul.Tensor, weight, row), [-1])
    bias = argument(node, "bias")
    if isinstance(bias, Node):
        result = call(aten.add.Tensor, result, bias)
    shape = [int(size) for size in dims(node)]  # pyright: ignore[reportArgumentType]
    _replace(node, call(aten.reshape.default, result, shape))


def _is_plain_decode(node: Node) -> bool:
    query = argument(node, "query")
    plain = all(argument(node, name) is None for name in ("bias", "sinks", "chunk"))
    return plain and str(dims(query)[2]) == "1"


def _one_query_attention(node: Node) -> None:
    """Attention of one query per row, [B, H, 1, D], as sums that fuse.

    The past holds at most what a window shows, so a window needs no mask here.
    """

    def call(target: Any, *args: Any) -> Node:
        return graphs.insert(node, target, args)

    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    batch, heads, _, width = (int(size) for size in dims(query))  # pyright: ignore[reportArgumentType]
    kv_heads, value_width = int(dims(key)[1]), int(dims(value)[3])  # pyright: ignore[reportArgumentType]
    grouped = call(aten.reshape.default, query, [batch, kv_heads, heads // kv_heads, 1, width])
    keys = call(aten.unsqueeze.default, key, 2)
    scores = call(aten.sum.dim_IntList, call(aten.mul.Tensor, grouped, keys), [-1])
    scores = call(aten.mul.Tensor, scores, argument(node, "scale"))
    softcap = float(argument(node, "softcap"))  # pyright: ignore[reportArgumentType]
    if softcap:
        scores = call(aten.tanh.default, call(aten.mul.Tensor, scores, 1 / softcap))
        scores = call(aten.mul.Tensor, scores, softcap)
    mask = argument(node, "key_mask")
    if isinstance(mask, Node):
        mask = call(aten.unsqueeze.default, call(aten.unsqueeze.default, mask, 1), 1)
        scores = call(aten.where.ScalarOther, mask, scores, float("-inf"))
    weights = call(aten.softmax.int, scores, -1)
    spread = call(aten.unsqueeze.default, weights, -1)
    values = call(aten.unsqueeze.default, value, 2)
    result = call(aten.sum.dim_IntList, call(aten.mul.Tensor, spread, values), [-2])
    _replace(node, call(aten.reshape.default, result, [batch, heads, 1, value_width]))


def _inline(node: Node, reference: Any) -> None:
    """Put the nodes of an op's reference in the op's place."""
    inputs = node.all_input_nodes

    def call(*values: Any) -> Any:
        table = dict(zip(inputs, values, strict=True))
        args = map_arg(node.args, lambda n: table[n])
        kwargs = map_arg(node.kwargs, lambda n: table[n])
        return reference(*args, **kwargs)

    traced = trace(node, call, [source.meta["val"] for source in inputs])
    copies: dict[Node, Any] = dict(
        zip((n for n in traced.graph.nodes if n.op == "placeholder"), inputs, strict=True)
    )
    for inner in traced.graph.nodes:
        if inner.op == "call_function":
            args = map_arg(inner.args, lambda n: copies[n])
            kwargs = map_arg(inner.kwargs, lambda n: copies[n])
            copies[inner] = graphs.insert(node, inner.target, args, dict(kwargs))
    result = traced.graph.output_node().args[0]
    assert isinstance(result, Node)
    _replace(node, copies[result])
