"""Graphs without in-place operators: each becomes its functional form and a write to the base.

1. ``x.add_(y)`` becomes ``new = x + y``; whoever reads ``x`` later reads ``new``.
2. If ``x`` is a view, ``new`` is written into what it is a view of, up to the base tensor.
3. Other views of that base that are read later are taken again from the new base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.errors import LoweringError
from fxgraft.kernels.spec import argument, dims
from fxgraft.operators import aliases_input, operator_of, qualified_name, writes
from fxgraft.program import Program

aten = torch.ops.aten
_SAME_STORAGE = frozenset({
    "aten::to", "aten::contiguous", "aten::reshape", "aten::dropout", "aten::type_as",
    "aten::flatten",
})  # fmt: skip
_RESHAPES = frozenset({
    "aten::view", "aten::unsqueeze", "aten::squeeze", "aten::reshape", "aten::unflatten",
    "aten::flatten", "aten::view_as",
})  # fmt: skip


def functional(program: Program) -> Program:
    """A Program in which no operator changes a tensor in place; itself if none does.

    Raises:
        LoweringError: something is changed in place through a view that cannot be written back.
    """
    if not any(map(writes, program.graph.nodes)):
        return program
    copy = program.copy()
    for node in copy.graph.find_nodes(op="call_function", target=aten.detach_.default):
        node.replace_all_uses_with(node.args[0])
        copy.graph.erase_node(node)
    for node in list(copy.graph.nodes):
        if writes(node):
            _replace(node)
    graphs.finish(copy.graph_module)
    return copy


def _replace(node: Node) -> None:
    changed = node.args[0]
    assert isinstance(changed, Node)
    new = _functional_form(node, changed)
    later = _later_nodes(node)
    aliases = _aliases(changed)
    current, place = new, changed
    replaced = {changed: new}
    while (source := _base_of(place)) is not None:
        current = _written_back(node, source, place, current)
        replaced[source] = current
        place = source
    for alias in aliases:
        if alias not in replaced and any(user in later for user in alias.users):
            replaced[alias] = _taken_again(node, alias, replaced)
    replaced[node] = new
    for old, value in replaced.items():
        for user in list(old.users):
            if user in later:
                user.replace_input_with(old, value)
    node.graph.erase_node(node)


def _later_nodes(node: Node) -> set[Node]:
    later: set[Node] = set()
    following = node.next
    while following.op != "root":
        later.add(following)
        following = following.next
    return later


def _functional_form(node: Node, changed: Node) -> Node:
    target = operator_of(node)
    if target is aten.copy_.default:
        source = graphs.insert(node, aten.to.dtype, (node.args[1], changed.meta["val"].dtype))
        return graphs.insert(node, aten.expand_as.default, (source, changed))
    form = _same_without_underscore(target)
    if form is None:
        raise _error(node, "it has no functional form")
    return graphs.insert(node, form, node.args, dict(node.kwargs))


def _same_without_underscore(target: Any) -> Any:
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.rstrip("_"), None)
    return getattr(packet, target._overloadname, None)


def _base_of(node: Node) -> Node | None:
    """What a node is a view of; None if it is a tensor of its own."""
    source = node.args[0] if node.args and operator_of(node) is not None else None
    if not isinstance(source, Node) or not isinstance(source.meta["val"], Tensor):
        return None
    if qualified_name(node) in _SAME_STORAGE:
        same = node.meta["val"].dtype == source.meta["val"].dtype
        return source if same and source.meta["val"].is_contiguous() else None
    return source if aliases_input(node) else None


def _aliases(node: Node) -> list[Node]:
    """The base of a view and all views of that base, in graph order."""
    base = node
    while (source := _base_of(base)) is not None:
        base = source
    found = [base]
    for other in node.graph.nodes:
        if _base_of(other) in found:
            found.append(other)
    return found


def _written_back(anchor: Node, source: Node, view: Node, value: Node) -> Node:
    """``source`` with its part ``view`` replaced by ``value``."""
    name = qualified_name(view)

    def insert(form: Any, *args: Any) -> Node:
        return graphs.insert(anchor, form, args)

    if name == "aten::slice":
        bounds = [argument(view, part) for part in ("dim", "start", "end", "step")]
        return insert(aten.slice_scatter.default, source, value, *bounds)
    if name == "aten::select":
        return insert(aten.select_scatter.default, source, value, *view.args[1:])
    if name == "aten::transpose":
        return insert(aten.transpose.int, value, *view.args[1:])
    if name == "aten::permute":
        return insert(aten.permute.default, value, _inverse(view))
    if name in _RESHAPES:
        return insert(aten.view_as.default, value, source)
    if name in _SAME_STORAGE or dims(view) == dims(source):
        return value
    raise _error(view, "what it views is changed in place later")


def _inverse(view: Node) -> list[int]:
    order = cast("Sequence[int]", argument(view, "dims"))
    axes = [axis % len(order) for axis in order]
    return [axes.index(axis) for axis in range(len(axes))]


def _taken_again(anchor: Node, alias: Node, replaced: dict[Node, Node]) -> Node:
    source = _base_of(alias)
    assert source is not None
    base = replaced.get(source, source)
    return graphs.insert(anchor, alias.target, (base, *alias.args[1:]), dict(alias.kwargs))  # pyright: ignore[reportArgumentType]


def _error(node: Node, problem: str) -> LoweringError:
    return LoweringError(
        f"node {node.name!r} ({graphs.short_target(node)}) cannot be written as ONNX: {problem}\n"
        f"  in module {node.meta.get('module', '?')!r} at {node.meta.get('source', '?')}",
        "rewrite that line of the model without changing a tensor in place",
    )
