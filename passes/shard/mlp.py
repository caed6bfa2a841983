"""MLPs: every process keeps some of the channels between the layers.

An MLP is found from its last layer backwards. Between that and the layers before it, every channel
must be computed from itself alone; the channels' places in the layers' outputs are found by moving
numbers as the graph moves data, however gate and up projection are merged or interleaved.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.collectives import Share
from fxgraft.kernels.spec import dims, spec_of
from fxgraft.layers import Layer
from fxgraft.operators import operator_of
from fxgraft.passes.prune_heads.heads import moved_numbers, moves_data, op_name
from fxgraft.passes.shard.experts import free, with_bias
from fxgraft.passes.shard.linears import Linear, keep_rows, linear_of, row_parallel
from fxgraft.program import Program

aten = torch.ops.aten
_VIEWS = frozenset({"aten::view", "aten::reshape", "aten::_unsafe_view"})
_CHANNELWISE = frozenset({"aten::to", "aten::_to_copy", "aten::dropout", "aten::clone",
                          "aten::contiguous", "aten::alias"})  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """Where channels come out of a layer.

    Attributes:
        linear: the layer.
        boundary: the last node that only moves its output's features; its last axis are channels.
        rows: which output feature of the layer each channel is, int64 [channels].
    """

    linear: Linear
    boundary: Node
    rows: Tensor


@dataclass(frozen=True)
class Mlp:
    """An MLP.

    Attributes:
        down: its last layer.
        channels: how many.
        leaves: where they come from.
        middle: nodes between, which compute each channel from itself.
        constants: weights with one value per channel that those read.
    """

    down: Linear
    channels: int
    leaves: list[Leaf] = field(default_factory=list[Leaf])
    middle: list[Node] = field(default_factory=list[Node])
    constants: list[Node] = field(default_factory=list[Node])


def find_mlps(program: Program) -> list[Mlp]:
    """The MLPs of all layers, in graph order."""
    reads = Counter(str(node.target) for node in program.graph.find_nodes(op="get_attr"))
    layers = program.layers
    taken = {name for layer in layers for name in _mixer_outputs(layer)}
    found: list[Mlp] = []
    for node in (node for layer in layers for node in layer.mlp):
        mlp = _find(node)
        if mlp is None:
            continue
        names = {mlp.down.weight, *(leaf.linear.weight for leaf in mlp.leaves)}
        if not names & taken and all(reads[name] == 1 for name in names):
            found.append(mlp)
            taken |= names
    return found


def _mixer_outputs(layer: Layer) -> set[str]:
    """Weights whose results leave a mixer: those are no first layer of an MLP."""
    nodes = [layer.projections_of(mixer).get("output") for mixer in layer.mixers]
    linears = [linear_of(node) for node in nodes if node is not None]
    return {linear.weight for linear in linears if linear is not None}


def _find(node: Node) -> Mlp | None:
    down = linear_of(with_bias(node))
    if down is None or not dims(down.source)[-1].is_Integer:
        return None
    mlp = Mlp(down, int(dims(down.source)[-1]))  # pyright: ignore[reportArgumentType]
    if not _walk(mlp) or not mlp.leaves:
        return None
    inside = {*mlp.middle, down.node, down.product}
    is_closed = all(user in inside or not _is_read(user) for n in mlp.middle for user in n.users)
    return mlp if is_closed else None


def _is_read(user: Node) -> bool:
    """Whether a user takes the values of what it reads, not only its size."""
    return user.op == "output" or isinstance(user.meta.get("val"), (Tensor, tuple, list))


def _walk(mlp: Mlp) -> bool:
    """Collect what a channel is computed from; False if anything works across channels."""
    pending, seen = [mlp.down.source], set[Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if dims(node)[-1] != mlp.channels:
            return False
        leaf = _leaf(node)
        if leaf is not None and len(leaf.rows) == mlp.channels:
            mlp.leaves.append(leaf)
        elif node.op == "get_attr":
            mlp.constants.append(node)
        elif leaf is None and _is_channelwise(node):
            mlp.middle.append(node)
            pending += [source for source in node.all_input_nodes if _has_channels(source)]
        else:
            return False
    return True


def _leaf(node: Node) -> Leaf | None:
    """The layer behind a node, if only moves of its features lie between."""
    start = node
    while (linear := linear_of(start)) is None:
        if not moves_data(start) or not start.all_input_nodes:
            return None
        start = start.all_input_nodes[0]
    if len(dims(start)) != len(dims(node)) and op_name(node) not in _VIEWS:
        return None
    return Leaf(linear, node, moved_numbers(start, node).flatten())


def _has_channels(node: Node) -> bool:
    """Whether a node's value may differ between channels: it is no number and no [..., 1]."""
    is_tensor = isinstance(node.meta.get("val"), Tensor)
    return is_tensor and bool(dims(node)) and dims(node)[-1] != 1


def _is_channelwise(node: Node) -> bool:
    spec, target = spec_of(node), operator_of(node)
    if spec is not None:
        return spec.kind == "activation"
    if op_name(node) in _VIEWS:
        before, after = dims(node.all_input_nodes[0]), dims(node)
        return before[-1:] == after[-1:]
    is_pointwise = target is not None and torch.Tag.pointwise in target.tags
    return is_pointwise or op_name(node) in _CHANNELWISE


def shard_mlps(program: Program, share: Share) -> tuple[int, int]:
    """Keep this process's channels in every MLP whose width the processes divide evenly.

    Returns:
        How many MLPs were divided, and how many cannot be.
    """
    found = find_mlps(program)
    even = [mlp for mlp in found if mlp.channels % share.size == 0]
    for mlp in even:
        _shard(program, mlp, share)
    graphs.finish(program.graph_module)
    return len(even), len(found) - len(even)


def _shard(program: Program, mlp: Mlp, share: Share) -> None:
    count = mlp.channels // share.size
    kept = slice(share.rank * count, (share.rank + 1) * count)
    middle = set(mlp.middle)
    inside = {*middle, mlp.down.node, mlp.down.product}
    for linear in (mlp.down, *(leaf.linear for leaf in mlp.leaves)):
        free(linear.node)
    for leaf in mlp.leaves:
        _replace(leaf.boundary, _local(program, leaf, leaf.rows[kept]), inside)
    for constant in mlp.constants:
        args = (constant, -1, kept.start, kept.stop)
        local = graphs.insert(constant, aten.slice.Tensor, args, after=True)
        _replace(constant, local, inside)
    for node in program.graph.nodes:
        if node in middle:
            _set_width(node, mlp.channels, count)
            node.meta["val"] = graphs.evaluate(node)
    down = linear_of(mlp.down.node)
    assert down is not None
    row_parallel(program, down, torch.arange(kept.start, kept.stop), share)


def _replace(old: Node, new: Node, users: set[Node]) -> None:
    for user in [user for user in old.users if user in users]:
        user.replace_input_with(old, new)


def _local(program: Program, leaf: Leaf, rows: Tensor) -> Node:
    """The layer with these output features only, with as many axes as the boundary."""
    local = keep_rows(program, leaf.linear, rows)
    if len(dims(local)) == len(dims(leaf.boundary)):
        return local
    shape = [*cast("list[int | Node]", leaf.boundary.args[1])[:-1], len(rows)]
    return graphs.insert(leaf.boundary, aten.reshape.default, (local, shape))


def _set_width(node: Node, before: int, after: int) -> None:
    """Views that spell out the number of channels."""
    if op_name(node) in _VIEWS:
        *rest, last = cast("list[int | Node]", node.args[1])
        node.update_arg(1, [*rest, after if last == before else last])
