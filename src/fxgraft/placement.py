"""Moving a Program to a device: weights, device arguments and metadata alike."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from fxgraft import graph as graphs
from fxgraft.program import Program


def move(program: Program, device: torch.device | str) -> None:
    """Move everything in a Program to a device, in place; weights that are there stay shared."""
    device = torch.device(device)
    for name, weight in list(program.weights()):
        if weight.device != device:
            moved = weight.to(device)
            is_parameter = isinstance(weight, torch.nn.Parameter)
            kept = torch.nn.Parameter(moved, weight.requires_grad) if is_parameter else moved
            graphs.set_weight(program.graph_module, name, kept)
    retarget(program, device)


def retarget(program: Program, device: torch.device) -> None:
    """Make a graph whose weights lie on ``device`` compute there.

    Needed after weights were replaced: the graph creates tensors on the device that it was
    captured on, and its metadata says so.
    """

    def on_device(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in program.graph.nodes:
        node.args = cast("tuple[Any, ...]", map_aggregate(node.args, on_device))
        node.kwargs = cast("dict[str, Any]", map_aggregate(node.kwargs, on_device))
        if node.op == "placeholder":
            _retarget_input(node, device)
    program.__dict__.pop("device", None)
    program.graph_module.recompile()
    graphs.propagate(program.graph_module)


def _retarget_input(node: Node, device: torch.device) -> None:
    value = node.meta["val"]
    if isinstance(value, torch.Tensor) and value.device != device:
        with graphs.fake_mode(node.graph):
            node.meta["val"] = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=device
            )
