"""Compute each value once: calls of the same pure operator with the same arguments are merged.

Reads of one weight, and size expressions that are equal as symbols, count as the same call. Ops
that are random or work in place, and what they touch, are left alone.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import Node

from fxgraft.kernels.spec import expr
from fxgraft.passes.optimize import effects
from fxgraft.program import Program


def rewrite(program: Program) -> int:
    """Replace every later duplicate by the first, in graph order.

    Returns:
        How many nodes were dropped.
    """
    graph, count = program.graph, 0
    written = effects.written(graph)
    first: dict[object, Node] = {}
    for node in list(graph.nodes):
        key = _key(node)
        if key is None or not effects.untouched(node, written):
            continue
        known = first.setdefault(key, node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)
            count += 1
    return count


def _key(node: Node) -> object:
    """What tells a node's value, or None if it may differ from call to call."""
    if node.op == "get_attr":
        return node.target if isinstance(node.meta.get("val"), torch.Tensor) else None
    if not effects.is_pure(node):
        return None
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return ("size", expr(value))
    return (node.target, _freeze(node.args), _freeze(node.kwargs))


def _freeze(value: Any) -> object:
    """A hashable form that tells 1, 1.0 and True, and 0.0 and -0.0, apart."""
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item) for item in cast("list[Any]", value))
    if isinstance(value, dict):
        items = sorted(cast("dict[str, Any]", value).items())
        return tuple((key, _freeze(item)) for key, item in items)
    if isinstance(value, (bool, int, float, complex)):
        return (type(value), repr(value))
    if isinstance(value, slice):
        bounds = cast(Any, value)
        return ("slice", _freeze((bounds.start, bounds.stop, bounds.step)))
    return value
