"""Compute once what depends on weights and constants alone.

Of every such computation the last node becomes a buffer, named after the first weight that it
reads, if its value has at most 1 MB or is no larger than what it is computed from. Views of a
weight cost nothing and stay; so do lone constructors such as ``arange(8)``. Weights without
values (on the meta device) are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from fxgraft import graph as graphs
from fxgraft.passes.optimize import effects, layouts
from fxgraft.passes.optimize.matching import is_tensor, value_of
from fxgraft.program import Program

_ALWAYS_SMALL_ENOUGH = 1 << 20


@dataclass
class _Constants:
    """Constant nodes of a Program.

    Attributes:
        weights: names of the weights that each constant node depends on.
        computed: constant nodes that are more than a weight, a view of one or a constructor.
        values: of the nodes computed so far.
    """

    program: Program
    weights: dict[Node, tuple[str, ...]] = field(default_factory=dict[Node, tuple[str, ...]])
    computed: set[Node] = field(default_factory=set[Node])
    values: dict[Node, Any] = field(default_factory=dict[Node, Any])


def rewrite(program: Program) -> int:
    """Fold every constant computation.

    Returns:
        How many buffers were made.
    """
    found = _find(program)
    edge = [node for node in found.computed if _is_worth_it(found, node)]
    order = {node: index for index, node in enumerate(program.graph.nodes)} if edge else {}
    for node in sorted(edge, key=order.__getitem__):
        _fold(found, node)
    if edge:
        effects.drop_unread(program.graph)
    return len(edge)


def _find(program: Program) -> _Constants:
    found = _Constants(program)
    written = effects.written(program.graph)
    for node in program.graph.nodes:
        if node in written:
            continue
        if node.op == "get_attr":
            if is_tensor(node) and not program.weight(str(node.target)).is_meta:
                found.weights[node] = (str(node.target),)
            continue
        inputs = node.all_input_nodes
        if effects.is_pure(node) and all(source in found.weights for source in inputs):
            names = [name for source in inputs for name in found.weights[source]]
            found.weights[node] = tuple(dict.fromkeys(names))
            if _computes(node) or not found.computed.isdisjoint(inputs):
                found.computed.add(node)
    return found


def _computes(node: Node) -> bool:
    return bool(node.all_input_nodes) and not effects.is_view(node)


def _is_worth_it(found: _Constants, node: Node) -> bool:
    if not is_tensor(node) or all(user in found.computed for user in node.users):
        return False
    value = value_of(node)
    size = value.numel() * value.element_size()
    inputs = [found.program.weight(name) for name in found.weights[node]]
    return size <= max(_ALWAYS_SMALL_ENOUGH, sum(w.numel() * w.element_size() for w in inputs))


def _fold(found: _Constants, node: Node) -> None:
    program = found.program
    name = _free_name(found, node)
    graphs.set_weight(program.graph_module, name, _evaluate(found, node).contiguous())
    read = graphs.insert_weight(program.graph_module, node, name)
    layouts.replace(node, read)


def _free_name(found: _Constants, node: Node) -> str:
    weights = found.weights[node]
    owner = weights[0] if weights else f"{node.meta.get('module', '')}.constant".lstrip(".")
    taken = {name for name, _ in found.program.weights()}
    base = name = f"{owner}_{graphs.short_target(node).rpartition('.')[2]}"
    number = 1
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    return name


def _evaluate(found: _Constants, node: Node) -> Any:
    """The node's value; inputs are computed before it, each once."""
    pending = [node]
    while pending:
        current = pending[-1]
        missing = [s for s in current.all_input_nodes if s not in found.values]
        pending += missing
        if not missing:
            found.values[pending.pop()] = _call(found, current)
    return found.values[node]


def _call(found: _Constants, node: Node) -> Any:
    if node.op == "get_attr":
        return found.program.weight(str(node.target)).detach()
    args = map_arg(node.args, found.values.__getitem__)
    kwargs = map_arg(node.kwargs, found.values.__getitem__)
    with torch.no_grad():
        return cast("Callable[..., Any]", node.target)(*args, **kwargs)
