"""Removes heads from the graph: smaller projections, smaller attention, smaller state.

1. Query, key and value become projections of their own with the kept heads' rows.
2. Query heads are ordered by the size of their group. Groups of one size become one attention;
   the results are joined again.
3. The output projection keeps the columns of the kept heads, in that order.
4. With no head left, the attention's contribution is zero (its projection's bias, if any).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.kernels.spec import argument, dims, set_argument
from fxgraft.passes.prune_heads.heads import Heads, Projection, op_name, refuse
from fxgraft.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class _Kept:
    """Kept heads in their new order.

    Attributes:
        query: old query head of each new one.
        kv: old key/value head of each new one.
        sizes: (query heads, key/value heads) of each attention.
    """

    query: list[int]
    kv: list[int]
    sizes: list[tuple[int, int]]


def remove(program: Program, heads: Heads, gone: set[int]) -> None:
    """Remove the query heads ``gone`` of one attention.

    Raises:
        PassError: something on the way depends on the number of heads in a way that is not known.
    """
    kept = _order(heads, gone)
    if not kept.query:
        _remove_all(program, heads)
        return
    for projection, order in (
        (heads.query, kept.query),
        (heads.key, kept.kv),
        (heads.value, kept.kv),
    ):
        _shrink_input(program, projection, order, heads.mixer)
    _shrink_head_arguments(heads.mixer, heads.query_heads, kept.query)
    results = _attentions(heads.mixer, kept)
    _shrink_output(program, heads, kept, results)


def _order(heads: Heads, gone: set[int]) -> _Kept:
    group = heads.query_heads // heads.kv_heads
    by_size: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for kv in range(heads.kv_heads):
        members = [q for q in range(kv * group, (kv + 1) * group) if q not in gone]
        if members:
            by_size[len(members)].append((kv, members))
    query: list[int] = []
    kv_heads: list[int] = []
    sizes: list[tuple[int, int]] = []
    for size in sorted(by_size, reverse=True):
        for kv, members in by_size[size]:
            kv_heads.append(kv)
            query.extend(members)
        sizes.append((size * len(by_size[size]), len(by_size[size])))
    return _Kept(query, kv_heads, sizes)


def _store(program: Program, anchor: Node, name: str, value: Tensor) -> Node:
    graphs.set_weight(program.graph_module, name, value)
    return graphs.insert_weight(program.graph_module, anchor, name)


def _like(old: Tensor, new: Tensor) -> Tensor:
    new = new.contiguous()
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _shrink_input(program: Program, projection: Projection, order: list[int], mixer: Node) -> None:
    """Replace a projection, up to its head dimension, by one with the kept heads only."""
    node, boundary = projection.node, projection.boundary
    rows = torch.cat([projection.index[head] for head in order])
    old = program.weight(projection.weight)
    matrix = old.detach() if projection.rows_first else old.detach().T
    anchor = boundary
    name = _part_name(projection, program)
    weight = _store(program, anchor, f"{name}.weight", _like(old, matrix[rows]))
    bias = None
    if projection.bias is not None:
        vector = program.weight(projection.bias)
        bias = _store(program, anchor, f"{name}.bias", _like(vector, vector.detach()[rows]))
    source = _tokens(node, projection.rows_first)
    flat = graphs.insert(anchor, aten.linear.default, (source, weight, bias))
    flat.meta["module"] = node.meta.get("module", "")
    for item in projection.elementwise:
        args = (flat, *item.args[1:])
        flat = graphs.insert(anchor, item.target, args, dict(item.kwargs))  # pyright: ignore[reportArgumentType]
    shaped = _shape_like(anchor, flat, projection, len(order))
    users = list(boundary.users)
    boundary.replace_all_uses_with(shaped)
    _fix_head_counts(users, len(projection.index), len(order))
    graphs.refresh([user for user in users if user is not mixer], until=(mixer,))


def _tokens(node: Node, rows_first: bool) -> Node:
    """A projection's input as [batch, sequence, features], before it is flattened."""
    source = node.args[0 if rows_first else 1]
    assert isinstance(source, Node)
    while len(dims(source)) == 2 and op_name(source) in {"aten::view", "aten::reshape"}:
        source = source.all_input_nodes[0]
    if len(dims(source)) != 3:
        raise refuse(node, "its input is not laid out as [batch, sequence, features]")
    return source


def _part_name(projection: Projection, program: Program) -> str:
    """A weight name that says which part of a merged projection this is."""
    base = projection.weight.removesuffix(".weight")
    node = projection.node
    if sum(1 for user in node.users if isinstance(user.meta.get("val"), Tensor)) <= 1 and (
        dims(node)[-1] == sum(len(head) for head in projection.index)
    ):
        return base
    taken = {name for name, _ in program.weights()}
    number = 0
    while f"{base}.part_{number}.weight" in taken:
        number += 1
    return f"{base}.part_{number}"


def _shape_like(anchor: Node, flat: Node, projection: Projection, count: int) -> Node:
    """Give ``flat`` [..., heads · D] the layout of the boundary, with ``count`` heads."""
    boundary, axis = projection.boundary, projection.heads_at
    width = len(projection.index[0])
    sizes = dims(boundary)
    if len(sizes) != 4 or (sizes[3].is_Integer and int(sizes[3]) != width):
        raise refuse(boundary, "heads are not laid out as [batch, sequence, heads, channels]")
    batch = graphs.insert(anchor, aten.sym_size.int, (flat, 0))
    length = graphs.insert(anchor, aten.sym_size.int, (flat, 1))
    split = graphs.insert(anchor, aten.reshape.default, (flat, [batch, length, count, width]))
    return graphs.insert(anchor, aten.transpose.int, (split, 1, 2)) if axis == 1 else split


def _fix_head_counts(users: list[Node], before: int, after: int) -> None:
    """Views between the head dimension and the attention that spell out the number of heads."""
    pending, seen = list(users), set[Node]()
    attention = torch.ops.fxgraft.attention.default
    while pending:
        node = pending.pop()
        if node in seen or node.target is attention or node.op == "output":
            continue
        seen.add(node)
        if op_name(node) in {"aten::view", "aten::reshape", "aten::expand"}:
            sizes = list(cast("list[int | Node]", node.args[1]))
            shape = [size if isinstance(size, int) else -1 for size in sizes]
            if len(shape) == 4 and before in shape[1:3]:
                place = shape.index(before, 1)
                sizes[place] = after
                node.update_arg(1, sizes)
        pending.extend(node.users)


def _shrink_head_arguments(mixer: Node, heads: int, order: list[int]) -> None:
    """Keep the rows of per-head biases and sinks."""
    for name, axis in (("bias", 1), ("sinks", 0)):
        value = argument(mixer, name)
        if isinstance(value, Node) and dims(value)[axis] == heads and heads > 1:
            set_argument(mixer, name, _pick(mixer, value, axis, order))


def _pick(anchor: Node, value: Node, axis: int, order: list[int]) -> Node:
    pieces = [graphs.insert(anchor, aten.slice.Tensor, (value, axis, h, h + 1)) for h in order]
    return graphs.insert(anchor, aten.cat.default, (pieces, axis))


def _attentions(mixer: Node, kept: _Kept) -> Node:
    """One attention per group size, joined along the heads."""
    if len(kept.sizes) == 1:
        mixer.meta["val"] = graphs.evaluate(mixer)
        return mixer
    arguments = {name: argument(mixer, name) for name in ("query", "key", "value", "bias", "sinks")}
    results: list[Node] = []
    query_at = kv_at = 0
    for queries, kv_heads in kept.sizes:
        spans = {
            "query": (1, query_at, queries),
            "key": (1, kv_at, kv_heads),
            "value": (1, kv_at, kv_heads),
            "bias": (1, query_at, queries),
            "sinks": (0, query_at, queries),
        }
        results.append(_part(mixer, arguments, spans, len(kept.query)))
        query_at, kv_at = query_at + queries, kv_at + kv_heads
    return graphs.insert(mixer, aten.cat.default, (results, 1))


def _part(
    mixer: Node,
    arguments: dict[str, object],
    spans: dict[str, tuple[int, int, int]],
    heads: int,
) -> Node:
    with mixer.graph.inserting_before(mixer):
        part = mixer.graph.node_copy(mixer)
    graphs.inherit(part, mixer)
    for name, (axis, start, length) in spans.items():
        value = arguments[name]
        if not isinstance(value, Node):
            continue
        if name == "bias" and dims(value)[1] != heads:
            continue
        cut = graphs.insert(part, aten.slice.Tensor, (value, axis, start, start + length))
        set_argument(part, name, cut)
    part.meta["val"] = graphs.evaluate(part)
    return part


def _shrink_output(program: Program, heads: Heads, kept: _Kept, result: Node) -> None:
    projection = heads.output
    node = projection.node
    columns = torch.cat([projection.index[head] for head in kept.query])
    old = program.weight(projection.weight)
    matrix = old.detach() if projection.rows_first else old.detach().T
    weight = _store(program, node, projection.weight, _like(old, matrix[:, columns]))
    bias = argument(node, "bias") if projection.rows_first else node.args[0]
    moved = graphs.insert(node, aten.transpose.int, (result, 1, 2))
    batch = graphs.insert(node, aten.sym_size.int, (moved, 0))
    length = graphs.insert(node, aten.sym_size.int, (moved, 1))
    flat = graphs.insert(node, aten.reshape.default, (moved, [batch, length, len(columns)]))
    replaced = graphs.insert(node, aten.linear.default, (flat, weight, bias))
    _replace_output(node, replaced)


def _replace_output(node: Node, replaced: Node) -> None:
    if len(dims(node)) == 3:
        node.replace_all_uses_with(replaced)
        return
    sizes = list(dims(node))
    for user in list(node.users):
        # A two-dimensional product (GPT-2) is viewed back to three dimensions right away.
        if not isinstance(user.meta.get("val"), Tensor) or dims(user) != dims(replaced):
            raise refuse(node, f"its output projection has the shape {sizes}")
        user.replace_all_uses_with(replaced)


def _remove_all(program: Program, heads: Heads) -> None:
    node = heads.output.node
    target = node if len(dims(node)) == 3 else next(iter(node.users))
    source = _tokens(heads.query.node, heads.query.rows_first)
    bias: Any = argument(node, "bias") if heads.output.rows_first else node.args[0]
    shape = [
        int(size) if size.is_Integer else _size_of(target, source, axis)  # pyright: ignore[reportArgumentType]
        for axis, size in enumerate(dims(target))
    ]
    value = target.meta["val"]
    empty = graphs.insert(
        target, aten.zeros.default, (shape,), {"dtype": value.dtype, "device": value.device}
    )
    if isinstance(bias, Node):
        empty = graphs.insert(target, aten.add.Tensor, (empty, bias))
    for user in list(target.users):
        _bypass(user, target, empty, bias)


def _size_of(anchor: Node, source: Node, axis: int) -> Node:
    return graphs.insert(anchor, aten.sym_size.int, (source, axis))


def _bypass(user: Node, output: Node, empty: Node, bias: object) -> None:
    """Drop an addition of nothing; elsewhere read zeros."""
    others = [other for other in user.all_input_nodes if other is not output]
    if (
        bias is None
        and user.target is aten.add.Tensor
        and len(user.all_input_nodes) == 2
        and not user.kwargs
        and dims(others[0]) == dims(user)
    ):
        user.replace_all_uses_with(others[0])
    else:
        user.replace_input_with(output, empty)
