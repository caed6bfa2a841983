"""Linear layers of one module that read the same tensor become one, followed by a split.

``q_proj``, ``k_proj`` and ``v_proj`` become ``q_proj+k_proj+v_proj``, ``gate_proj`` and
``up_proj`` become ``gate_proj+up_proj``; the old weights are dropped. The input is then read once,
and one large matrix product runs instead of several small ones. A weight that anything else reads,
or that shares memory with another (a tied embedding), is left alone. Where some of the layers have
a bias, the others get zeros. Layers whose weights are packed as N:M sparse ones merge with those of
their N and M.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from typing import cast

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from fxgraft import graph as graphs
from fxgraft.passes.optimize import effects, layouts
from fxgraft.passes.optimize.matching import aten, calls, source, value_of
from fxgraft.program import Program

_NM_LINEAR: OpOverload = torch.ops.fxgraft.nm_linear.default


def rewrite(program: Program) -> int:
    """Merge every group of sibling layers.

    Returns:
        How many groups there were.
    """
    groups = _groups(program)
    pieces = [piece for group in groups for piece in _merge(program.graph_module, group)]
    if groups:
        effects.drop_unread(program.graph)
        layouts.restride(user for piece in pieces for user in piece.users)
    return len(groups)


def _groups(program: Program) -> list[list[Node]]:
    """Layers with the same input, owner and dtype, two or more each."""
    written = effects.written(program.graph)
    readers = Counter(str(node.target) for node in program.graph.find_nodes(op="get_attr"))
    memory = Counter(_memory(weight) for _, weight in program.weights())
    groups: dict[object, list[Node]] = defaultdict(list)
    for node in (*calls(program.graph, aten.linear.default), *calls(program.graph, _NM_LINEAR)):
        names = [_own_weight(value, readers) for value in node.args[1:] if value is not None]
        is_plain = len(node.args) < 5 and not any(isinstance(v, Node) for v in node.kwargs.values())
        if None in names or not is_plain or not effects.untouched(node, written):
            continue
        weights = [program.weight(str(name)) for name in names]
        if all(memory[_memory(weight)] == 1 for weight in weights):
            owner = _layer(node).rpartition(".")[0]
            pattern = tuple(sorted(node.kwargs.items()))
            groups[source(node), owner, weights[0].dtype, pattern].append(node)
    return [group for group in groups.values() if len(group) > 1]


def _own_weight(value: object, readers: Counter[str]) -> str | None:
    """Name of a weight that is read once, else None."""
    if not isinstance(value, Node) or value.op != "get_attr" or len(value.users) != 1:
        return None
    return str(value.target) if readers[str(value.target)] == 1 else None


def _memory(weight: torch.Tensor) -> object:
    """What tells whether two weights share memory; on the meta device only identity can."""
    return id(weight) if weight.is_meta else weight.data_ptr()


def _layer(linear: Node) -> str:
    """Path of the layer, from the name of its weight."""
    weight = source(linear, 1)
    assert weight is not None
    return str(weight.target).removesuffix(".weight").removesuffix(".values")


def _merge(module: GraphModule, group: list[Node]) -> list[Node]:
    """Insert one layer for a group.

    Returns:
        The piece of its result that replaces each of the group.
    """
    first, layers = group[0], [_layer(linear) for linear in group]
    parent = layers[0].rpartition(".")[0]
    joined = "+".join(layer.removeprefix(f"{parent}.") for layer in layers)
    name = f"{parent}.{joined}" if parent else joined
    reads = _join_weights(module, group, name)
    sizes = [value_of(linear).shape[-1] for linear in group]
    merged = graphs.insert(
        first, cast(OpOverload, first.target), (source(first), *reads), dict(first.kwargs)
    )
    split = graphs.insert(first, aten.split_with_sizes.default, (merged, sizes, -1))
    for node in (*reads, merged, split):
        node.meta["module"] = name
    pieces: list[Node] = []
    for index, linear in enumerate(group):
        piece = graphs.insert(linear, operator.getitem, (split, index))
        linear.replace_all_uses_with(piece)
        pieces.append(piece)
    return pieces


def _join_weights(module: GraphModule, group: list[Node], name: str) -> list[Node]:
    """Store the joined weight, and bias if any layer has one, and read them."""
    parts = {"weight": 0}
    if group[0].target is _NM_LINEAR:
        # Both are [..., rows, ...]; see fxgraft.kernels.nm_linear.layout.
        parts = {"values": 2, "indices": 2}
    stored: list[str] = []
    for place, (part, dim) in enumerate(parts.items(), 1):
        weights = [_weight(module, linear, place) for linear in group]
        stored.append(f"{name}.{part}")
        graphs.set_weight(module, stored[-1], _cat([w for w in weights if w is not None], dim))
    biases = [_weight(module, linear, len(parts) + 1) for linear in group]
    if any(bias is not None for bias in biases):
        stored.append(f"{name}.bias")
        like = graphs.weight_of(module, stored[0])
        rows = [value_of(linear).shape[-1] for linear in group]
        pairs = zip(rows, biases, strict=True)
        zeros = [like.new_zeros(count) if bias is None else bias for count, bias in pairs]
        graphs.set_weight(module, stored[-1], _cat(zeros, 0))
    return [graphs.insert_weight(module, group[0], weight) for weight in stored]


def _weight(module: GraphModule, linear: Node, index: int) -> torch.Tensor | None:
    read = source(linear, index)
    return None if read is None else graphs.weight_of(module, str(read.target))


def _cat(weights: list[torch.Tensor], dim: int) -> torch.Tensor:
    joined = torch.cat([weight.detach() for weight in weights], dim)
    if not any(isinstance(weight, torch.nn.Parameter) for weight in weights):
        return joined
    trained = any(weight.requires_grad for weight in weights)
    return torch.nn.Parameter(joined, requires_grad=trained)
