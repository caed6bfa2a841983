"""Which operators and nodes may be removed, merged or moved: those without side effects."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

_ALIASING = frozenset({
    operator.getitem, torch.ops.aten.type_as.default, torch.ops.aten._unsafe_view.default,
})  # fmt: skip
_torch: Any = torch
_SYMBOLIC = frozenset({
    _torch.sym_max, _torch.sym_min, _torch.sym_int, _torch.sym_float, _torch.sym_not,
})  # fmt: skip
_UNSAFE_TAGS = ("nondeterministic_seeded", "dynamic_output_shape", "data_dependent_output")


@dataclass(frozen=True)
class _Effects:
    """What calling an operator does besides computing.

    Attributes:
        writes: names of the arguments that it writes to.
        aliases: whether its result may share memory with an argument.
        pure: whether equal arguments always give an equal result and nothing else happens.
    """

    writes: tuple[str, ...]
    aliases: bool
    pure: bool


@cache
def _effects(target: Any) -> _Effects:
    if not isinstance(target, OpOverload):
        module = getattr(target, "__module__", "")
        is_arithmetic = module in ("_operator", "math") or target in _SYMBOLIC
        return _Effects((), target in _ALIASING, is_arithmetic)
    schema = target._schema  # pyright: ignore[reportPrivateUsage]
    writes = tuple(a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write)
    tags = {tag.name for tag in target.tags}
    aliases = any(value.alias_info for value in schema.returns) or target in _ALIASING
    aliases = aliases or "maybe_aliasing_or_mutating" in tags
    pure = not schema.is_mutable and bool(schema.returns) and tags.isdisjoint(_UNSAFE_TAGS)
    return _Effects(writes, aliases, pure)


def _target(node: Node) -> Any:
    return node.target


def is_pure(node: Node) -> bool:
    """Whether a call depends on its arguments only and does nothing but compute its result."""
    return node.op == "call_function" and _effects(_target(node)).pure


def is_view(node: Node) -> bool:
    """Whether a call computes nothing: its result shares the memory of an argument."""
    return node.op == "call_function" and _effects(_target(node)).aliases


def writes(target: Any) -> tuple[str, ...]:
    """Names of the arguments that an operator writes to."""
    return _effects(target).writes


def owners(graph: Graph) -> dict[Node, Node]:
    """For each node the first one that has the same memory."""
    found: dict[Node, Node] = {}
    for node in graph.nodes:
        shares = is_view(node) or bool(_writes(node))
        found[node] = found[node.all_input_nodes[0]] if shares and node.all_input_nodes else node
    return found


def written(graph: Graph) -> frozenset[Node]:
    """Nodes whose memory some in-place operator writes to, directly or through a view."""
    writers = [node for node in graph.nodes if _writes(node)]
    if not writers:
        return frozenset()
    memory = owners(graph)
    hit = {memory[target] for node in writers for target in _targets(node)}
    return frozenset(node for node, owner in memory.items() if owner in hit)


def _writes(node: Node) -> tuple[str, ...]:
    return writes(_target(node)) if node.op == "call_function" else ()


def _targets(node: Node) -> list[Node]:
    schema = _target(node)._schema
    names = [argument.name for argument in schema.arguments]
    values = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    found = [values.get(name) for name in _writes(node)]
    found += [item for value in found if isinstance(value, (list, tuple)) for item in value]
    return [value for value in found if isinstance(value, Node)]


def untouched(node: Node, written_nodes: frozenset[Node]) -> bool:
    """Whether neither a node nor what it reads is ever written to in place."""
    if not written_nodes:
        return True
    return node not in written_nodes and written_nodes.isdisjoint(node.all_input_nodes)


def drop_unread(graph: Graph) -> None:
    """Erase what nobody reads, so that what is left of matched patterns hides no other one."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "get_attr" or is_pure(node)):
            graph.erase_node(node)
