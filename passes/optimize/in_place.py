"""Elementwise operators that work in place become the ones that do not.

``x.div_(y)`` hides what comes after it from every other rewrite, since a value is then no longer
what the node that made it computed. It is replaced where nothing reads the old x, or a view of
it, afterwards, and where x is no input and no weight, whose change would be seen outside.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.passes.optimize import effects, layouts
from fxgraft.passes.optimize.matching import aten
from fxgraft.program import Program


def rewrite(program: Program) -> int:
    """Replace the operators, in graph order.

    Returns:
        How many were replaced.
    """
    candidates = [(node, found) for node in program.graph.nodes if (found := _functional(node))]
    if not candidates:
        return 0
    memory = effects.owners(program.graph)
    sharing: dict[Node, list[Node]] = defaultdict(list)
    for node, owner in memory.items():
        sharing[owner].append(node)
    return sum(
        _replace(node, functional)
        for node, functional in candidates
        if memory[node].op == "call_function" and not _is_seen(node, sharing[memory[node]])
    )


def _functional(node: Node) -> Any:
    """The elementwise operator that computes what an in-place one writes, or None."""
    target = node.target if node.op == "call_function" else None
    if not isinstance(target, OpOverload) or not effects.writes(target):
        return None
    name, _, overload = target.name().removeprefix("aten::").partition(".")
    packet = getattr(aten, name.removesuffix("_"), None)
    found = getattr(packet, overload or "default", None)
    is_elementwise = found is not None and torch.Tag.pointwise in found.tags
    return found if is_elementwise and name.endswith("_") else None


def _is_seen(node: Node, sharing: list[Node]) -> bool:
    """Whether anything but the node's own result shows that memory was written to.

    Args:
        node: the in-place call.
        sharing: nodes with the same memory, in graph order.
    """
    own = {node}
    for other in sharing:
        if other.all_input_nodes and other.all_input_nodes[0] in own:
            own.add(other)
        elif other is not node and any(node < user for user in other.users):
            return True
    return False


def _replace(node: Node, functional: Any) -> bool:
    target, node.target = node.target, functional
    value, before = graphs.evaluate(node), node.meta["val"]
    if value.dtype != before.dtype or value.shape != before.shape:
        node.target = target
        return False
    node.meta["val"] = value
    graphs.inherit(node, node)
    if layouts.strides(value) != layouts.strides(before):
        layouts.restride(node.users)
    return True
