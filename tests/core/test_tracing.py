"""Graphs of functions."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule

from fxgraft.tracing import spell_out_sizes

aten = torch.ops.aten


def test_a_whole_shape_becomes_its_sizes() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3, 4, device="meta")
    shape = graph.call_function(aten.size.default, (x,))
    graph.call_function(aten.size.default, (x,))
    last = graph.call_function(operator.getitem, (shape, -1))
    flat = graph.call_function(aten.reshape.default, (x, [-1, last]))
    back = graph.call_function(aten.reshape.default, (flat, shape))
    graph.output((flat, back))
    module = spell_out_sizes(GraphModule(torch.nn.Module(), graph))
    assert not module.graph.find_nodes(op="call_function", target=aten.size.default)
    value = torch.randn(2, 3, 4)
    found = module(value)
    assert torch.equal(found[0], value.reshape(6, 4))
    assert torch.equal(found[1], value)
