"""The residual stream that enters a block: where it is steered, and where it is looked at.

Layer L is x_L of the paper: the input of block L, which is the output of block L - 1 and entry L of
transformers' ``hidden_states``. The number of blocks stands for the stream after the final norm.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.program import Program


def stream_at(program: Program, index: int) -> Node:
    """The node x_L [B, S, D] of layer ``index``."""
    layers = program.layers
    if index < len(layers):
        return layers[index].residual_in
    node = program.output_nodes["logits"]
    while node.target is not torch.ops.aten.linear.default:
        node = node.all_input_nodes[0]
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def stream_users(program: Program, index: int) -> list[Node]:
    """The readers of a block's input that belong to the block or come after it."""
    stream, layers = stream_at(program, index), program.layers
    if index >= len(layers):
        return list(stream.users)
    first = layers[index].nodes[0]
    return [user for user in stream.users if not user < first]


def tapped(program: Program, indices: tuple[int, ...]) -> Program:
    """A Program whose outputs are the streams ``layer_<L>``, and that computes nothing behind them.

    Args:
        program: it is not changed.
        indices: the layers.
    """
    copy = program.copy()
    streams = [stream_at(copy, index) for index in indices]
    copy.graph.output_node().args = (tuple(streams),)
    copy.outputs = tuple(f"layer_{index}" for index in indices)
    graphs.finish(copy.graph_module)
    return copy
