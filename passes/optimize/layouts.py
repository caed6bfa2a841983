"""Putting one node in another's place where their memory layouts differ."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.errors import GraphError
from fxgraft.kernels.spec import expr
from fxgraft.passes.optimize import effects
from fxgraft.passes.optimize.matching import aten, is_call


def replace(old: Node, new: Node) -> None:
    """Let ``new``, a value of the same shape and dtype, be read wherever ``old`` was."""
    old.replace_all_uses_with(new)
    if strides(new.meta["val"]) != strides(old.meta["val"]):
        restride(new.users)


def restride(nodes: Iterable[Node]) -> None:
    """Make the values of nodes, and of what reads them, true after a memory layout changed.

    Shapes stay. A view that the new layout does not allow becomes a reshape.
    """
    pending = [node for node in nodes if node.op == "call_function"]
    heapq.heapify(pending)
    while pending:
        node = heapq.heappop(pending)
        if pending and pending[0] is node:
            continue
        before = node.meta.get("val")
        node.meta["val"] = _evaluate(node)
        if strides(before) != strides(node.meta["val"]):
            for user in node.users:
                if user.op == "call_function":
                    heapq.heappush(pending, user)


def true_value(node: Node) -> torch.Tensor:
    """The value of a node, its layout computed anew if the node is a view."""
    chain = [node]
    while effects.is_view(chain[-1]) and len(chain[-1].all_input_nodes) == 1:
        chain.append(chain[-1].all_input_nodes[0])
    for view in reversed(chain[:-1]):
        view.meta["val"] = graphs.evaluate(view)
    return cast(torch.Tensor, node.meta["val"])


def strides(value: Any) -> object:
    """Strides of a tensor, or of each tensor of a list, as expressions."""
    if isinstance(value, (list, tuple)):
        return [strides(item) for item in cast("list[Any]", value)]
    is_tensor = isinstance(value, torch.Tensor)
    return [expr(stride) for stride in value.stride()] if is_tensor else None


def _evaluate(node: Node) -> Any:
    try:
        return graphs.evaluate(node)
    except GraphError:
        if not is_call(node, aten.view.default):
            raise
        node.target = aten.reshape.default
        graphs.inherit(node, node)
        return graphs.evaluate(node)
