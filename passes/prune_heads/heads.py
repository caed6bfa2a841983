"""Finds, for every attention, which weights belong to which head.

Nothing is recognised by architecture. Between a projection and the place where heads get a
dimension of their own, a graph only moves data (views, transposes, splits). Running those moves on
the numbers 0, 1, 2, … shows which output feature of the projection ends up in which head, however
query, key and value are merged or interleaved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxgraft import graph as graphs
from fxgraft.errors import PassError
from fxgraft.kernels.spec import argument, dims
from fxgraft.operators import qualified_name
from fxgraft.program import Program

aten = torch.ops.aten
_LINEARS = (aten.linear.default, aten.addmm.default)
_SPLITS = frozenset({"aten::split", "aten::split_with_sizes", "aten::chunk"})
# One size per dynamic dimension is enough to run data movements on numbers.
_ROWS = 1


@dataclass(frozen=True)
class Projection:
    """A linear node and its features by head.

    Attributes:
        node: the linear node.
        weight: name of its weight.
        bias: name of its bias, or None.
        rows_first: whether the weight is stored [out, in] (else [in, out]).
        index: per head, which output features (of the output projection: input features) are
            its channels, int64 [D].
        boundary: the first node with a head dimension (of the output projection: the last).
        heads_at: position of the head dimension in the boundary's shape.
        elementwise: nodes between projection and boundary that scale or clip every feature alike.
    """

    node: Node
    weight: str
    bias: str | None
    rows_first: bool
    index: list[Tensor]
    boundary: Node
    heads_at: int
    elementwise: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Heads:
    """One attention and its projections.

    Attributes:
        mixer: the attention node.
        query_heads, kv_heads: how many.
        query, key, value, output: the projections.
    """

    mixer: Node
    query_heads: int
    kv_heads: int
    query: Projection
    key: Projection
    value: Projection
    output: Projection


def find_heads(program: Program) -> list[Heads]:
    """Every attention of a Program, in graph order.

    Raises:
        PassError: the weights of some attention cannot be told apart by head; names the module.
    """
    attention = torch.ops.fxgraft.attention.default
    nodes = program.graph.find_nodes(op="call_function", target=attention)
    return [heads_of(node) for node in nodes]


def refuse(node: Node, why: str) -> PassError:
    """The error for an attention whose heads cannot be pruned."""
    module, source = node.meta.get("module", "?"), node.meta.get("source", "?")
    return PassError(
        f"heads of {module!r} cannot be pruned: {why}\n"
        f"  at node {node.name!r} ({graphs.short_target(node)}), {source}",
        "leave this model's heads alone, or report the architecture",
    )


def heads_of(mixer: Node) -> Heads:
    """The projections of one attention.

    Raises:
        PassError: its weights cannot be told apart by head; names the module.
    """
    query, key, value = (argument(mixer, name) for name in ("query", "key", "value"))
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    return Heads(
        mixer=mixer,
        query_heads=int(dims(query)[1]),  # pyright: ignore[reportArgumentType]
        kv_heads=int(dims(key)[1]),  # pyright: ignore[reportArgumentType]
        query=_input_projection(query),
        key=_input_projection(key),
        value=_input_projection(value),
        output=_output_projection(mixer),
    )


def _input_projection(value: Node) -> Projection:
    boundary, heads_at = _boundary(value)
    linear, elementwise = _linear_behind(boundary)
    numbers = moved_numbers(linear, boundary).movedim(heads_at, 0)
    index = [head.flatten() for head in numbers]
    return replace(_projection(linear, index, boundary, heads_at), elementwise=elementwise)


def _boundary(value: Node) -> tuple[Node, int]:
    """Walk back over per-head computation to where heads get their dimension."""
    node, axis = value, 1
    while True:
        previous = _same_heads(node, axis)
        if previous is None:
            if _is_only_way(node, value):
                return node, axis
            # One of several parts of every head, such as the rotated channels.
            previous = _part_of_heads(node, axis)
        if previous is None:
            raise refuse(value, "its heads come from several projections")
        node, axis = previous


def _is_only_way(node: Node, value: Node) -> bool:
    """Whether ``value`` depends on projections through ``node`` alone."""
    pending, seen = [value], {node}
    while pending:
        source = pending.pop()
        if source.target in _LINEARS:
            return False
        if source not in seen:
            seen.add(source)
            pending.extend(source.all_input_nodes)
    return True


def _part_of_heads(node: Node, axis: int) -> tuple[Node, int] | None:
    """What ``node`` takes some channels or positions of, with the same heads; None for others."""
    source, at = node, 1
    if op_name(node) == "getitem":
        source, at = node.all_input_nodes[0], 2
    if op_name(source) == "aten::slice" or op_name(source) in _SPLITS:
        whole = source.all_input_nodes[0]
        dim = source.args[at] if len(source.args) > at else source.kwargs.get("dim", 0)
        return None if cast(int, dim) % len(dims(whole)) == axis else (whole, axis)
    return None


def _same_heads(node: Node, axis: int) -> tuple[Node, int] | None:
    """The input of ``node`` that has the same heads, and where; None at the boundary."""
    count = dims(node)[axis]
    if node.target is aten.transpose.int:
        first, second = (cast(int, a) % len(dims(node)) for a in node.args[1:3])
        moved = {first: second, second: first}.get(axis, axis)
        return cast(Node, node.args[0]), moved
    if node.target is aten.permute.default:
        order = [place % len(dims(node)) for place in cast("list[int]", node.args[1])]
        return cast(Node, node.args[0]), order[axis]
    if moves_data(node) and node.target not in (aten.contiguous.default, aten.clone.default):
        return None
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        if (
            isinstance(value, torch.Tensor)
            and len(dims(source)) == len(dims(node))
            and dims(source)[axis] == count
            and source.op == "call_function"
            and _comes_from_linear(source)
        ):
            return source, axis
    return None


def _comes_from_linear(node: Node) -> bool:
    """Whether a projection is among the node's sources, rather than positions or constants."""
    pending, seen = [node], set[Node]()
    while pending:
        source = pending.pop()
        if source.target in _LINEARS:
            return True
        if source not in seen:
            seen.add(source)
            pending.extend(source.all_input_nodes)
    return False


def op_name(node: Node) -> str:
    """An operator's name without its overload, for example ``"aten::view"``."""
    return qualified_name(node) or getattr(node.target, "__name__", str(node.target))


def moves_data(node: Node) -> bool:
    """Whether a node only rearranges elements."""
    return op_name(node) in {
        "getitem", "aten::view", "aten::reshape", "aten::_unsafe_view", "aten::transpose",
        "aten::permute", "aten::split", "aten::split_with_sizes", "aten::chunk", "aten::slice",
        "aten::select", "aten::unbind", "aten::squeeze", "aten::unsqueeze", "aten::contiguous",
        "aten::clone", "aten::unflatten", "aten::flatten",
    }  # fmt: skip


def _is_alike(node: Node) -> bool:
    """Whether a node does the same to every element, with constants only."""
    return len(node.all_input_nodes) == 1 and op_name(node) in {
        "aten::mul", "aten::div", "aten::clamp", "aten::neg", "aten::to", "aten::_to_copy",
    }  # fmt: skip


def _linear_behind(start: Node) -> tuple[Node, tuple[Node, ...]]:
    """The projection behind a boundary, and what scales its features on the way, in order."""
    node, elementwise = start, list[Node]()
    while node.target not in _LINEARS:
        if _is_alike(node):
            elementwise.insert(0, node)
        elif not moves_data(node):
            raise refuse(start, f"{graphs.short_target(node)} works across heads")
        node = node.all_input_nodes[0]
    return node, tuple(elementwise)


def moved_numbers(linear: Node, goal: Node) -> Tensor:
    """Numbers 0 … out−1 in the place of the linear's output, moved as the graph does to goal."""
    width = int(dims(linear)[-1])  # pyright: ignore[reportArgumentType]
    rank = len(dims(linear))
    numbers = torch.arange(width).reshape([_ROWS] * (rank - 1) + [width])
    return _run_moves(linear, numbers, goal)


def _run_moves(start: Node, value: Tensor, goal: Node) -> Tensor:
    if goal is start:
        return value
    done: dict[Node, Any] = {start: value}

    def compute(node: Node) -> Any:
        if node not in done:
            if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
                return _ROWS  # a size of a dynamic dimension
            if _is_alike(node):
                return compute(node.all_input_nodes[0])
            args = map_arg(node.args, compute)
            kwargs = map_arg(node.kwargs, compute)
            done[node] = cast(Callable[..., Any], node.target)(*args, **kwargs)
        return done[node]

    result = compute(goal)
    assert isinstance(result, Tensor)
    return result


def _projection(node: Node, index: list[Tensor], boundary: Node, heads_at: int) -> Projection:
    if node.target is aten.linear.default:
        weight, bias, rows_first = node.args[1], argument(node, "bias"), True
    else:
        bias, weight, rows_first = node.args[0], node.args[2], False
    names = [_name(value, node) for value in (weight, bias)]
    assert names[0] is not None
    return Projection(node, names[0], names[1], rows_first, index, boundary, heads_at)


def _name(value: object, node: Node) -> str | None:
    if value is None:
        return None
    if not isinstance(value, Node) or value.op != "get_attr":
        raise refuse(node, "its weight is computed, not stored")
    return str(value.target)


def _output_projection(mixer: Node) -> Projection:
    """Follow the attention's result forward to the projection that reads it."""
    node = mixer
    while True:
        users = [u for u in node.users if isinstance(u.meta.get("val"), (torch.Tensor, tuple))]
        if len(users) != 1:
            raise refuse(mixer, "its result is read in several places")
        user = users[0]
        if user.target in _LINEARS:
            break
        if not moves_data(user):
            raise refuse(user, f"{graphs.short_target(user)} comes before the output projection")
        node = user
    shape = [_ROWS if not size.is_Integer else int(size) for size in dims(mixer)]  # pyright: ignore[reportArgumentType]
    shape[0] = shape[2] = _ROWS
    numbers = torch.arange(shape[1] * shape[3]).reshape(shape)
    order = _run_moves(mixer, numbers, node).flatten()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    columns = place.reshape(shape[1], shape[3])
    return _projection(user, list(columns), node, 1)
