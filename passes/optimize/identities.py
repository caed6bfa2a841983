"""Drop nodes that change nothing.

1. Checks that export left behind (``_assert_tensor_metadata``) are erased.
2. Casts written in other ways (``to.device`` at hand, ``type_as``, ``_to_copy``) become
   ``aten.to.dtype``, so that later rewrites see one form.
3. A cast to the dtype at hand, dropout in evaluation mode, ``alias`` and ``detach`` are dropped.
4. Views, slices, expansions and repetitions to the shape at hand, and ``contiguous`` and
   ``clone`` of what has that memory layout already, are dropped; so is ``contiguous`` that only
   a reshape reads.
5. Transposes and permutations that cancel each other are dropped.
6. ``x * 1``, ``x / 1``, ``x + 0`` and ``x - 0`` are dropped where dtype and shape stay.
7. Empty pieces of a concatenation are dropped, then a concatenation of one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch._prims_common import is_contiguous_or_false
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.kernels.spec import argument, expr
from fxgraft.passes.optimize import effects, layouts
from fxgraft.passes.optimize.matching import (
    aten,
    dtype_of,
    is_call,
    is_tensor,
    number,
    rank,
    same_size,
    source,
    value_of,
)
from fxgraft.program import Program

_DROPOUTS = frozenset({
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default, aten.dropout_.default,
})  # fmt: skip
_ALIASES = frozenset({
    aten.alias.default, aten.detach.default, aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
})  # fmt: skip
_CASTS = frozenset({
    aten.to.device, aten.to.other, aten.to.dtype_layout, aten.type_as.default,
    aten._to_copy.default,
})  # fmt: skip
_RESHAPES = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.slice.Tensor,
    aten.flatten.using_ints, aten.expand.default, aten.repeat.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default, aten.broadcast_to.default, aten.expand_as.default,
    aten.view_as.default, aten.reshape_as.default, aten.repeat_interleave.self_int,
})  # fmt: skip
_PERMUTES = frozenset({aten.transpose.int, aten.permute.default, aten.t.default})
_NEUTRAL: dict[Any, float] = {
    aten.mul.Tensor: 1.0, aten.mul.Scalar: 1.0, aten.div.Tensor: 1.0, aten.div.Scalar: 1.0,
    aten.add.Tensor: 0.0, aten.add.Scalar: 0.0, aten.sub.Tensor: 0.0, aten.sub.Scalar: 0.0,
}  # fmt: skip


def rewrite(program: Program) -> int:
    """Apply the rules above to the whole graph, once in graph order.

    Returns:
        How many nodes were dropped or rewritten.
    """
    graph, count = program.graph, 0
    written = effects.written(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
            count += 1
            continue
        rule = _RULES.get(node.target)
        if rule is None or not is_tensor(node):
            continue
        if not effects.untouched(node, written) and node.target is not aten.dropout_.default:
            continue
        count += _normalise(node)
        same = rule(node)
        if same is not None:
            layouts.replace(node, same)
            graph.erase_node(node)
            count += 1
    return count


def _normalise(node: Node) -> int:
    """Rule 2, in place: the node's value stays what it is."""
    before = source(node)
    if node.target not in _CASTS or not is_tensor(before):
        return 0
    if value_of(before).device != value_of(node).device or node.kwargs.get("memory_format"):
        return 0
    if dtype_of(before) == dtype_of(node) and not _keeps_layout(node, before):
        return 0
    node.target = aten.to.dtype
    node.args, node.kwargs = (before, dtype_of(node)), {}
    graphs.inherit(node, node)
    return 1


def _keeps_layout(node: Node, before: Node) -> bool:
    return layouts.strides(value_of(node)) == layouts.strides(value_of(before))


def _cast(node: Node) -> Node | None:
    before = source(node)
    if before is None or not is_call(node, aten.to.dtype):
        return None
    return before if dtype_of(before) == dtype_of(node) and _keeps_layout(node, before) else None


def _dropout(node: Node) -> Node | None:
    inactive = argument(node, "train") is False or argument(node, "p") == 0
    return source(node) if inactive else None


def _always(node: Node) -> Node | None:
    return source(node)


def _reshape(node: Node) -> Node | None:
    before = source(node)
    return before if before is not None and same_size(node, before) else None


def _layout(node: Node) -> Node | None:
    before = source(node)
    if before is None or all(is_call(user, aten.reshape.default) for user in node.users):
        # Reshape copies where it has to, so a copy made for it alone is one too many.
        return before
    is_dense = is_contiguous_or_false(layouts.true_value(before))
    return before if is_dense and _keeps_layout(node, before) else None


def _permute(node: Node) -> Node | None:
    before = source(node)
    order = _order(node)
    if before is None or order is None:
        return None
    if order == list(range(len(order))):
        return before
    inner = _order(before)
    if inner is None or [inner[axis] for axis in order] != list(range(len(order))):
        return None
    return source(before)


def _order(node: Node) -> list[int] | None:
    """The input's axis at each axis of the output, or None if the node is no permutation."""
    if not is_call(node, *_PERMUTES):
        return None
    axes = list(range(rank(node)))
    if is_call(node, aten.permute.default):
        return [axes[cast(int, axis)] for axis in cast("list[Any]", node.args[1])]
    if is_call(node, aten.t.default):
        return axes[::-1]
    first, second = cast("tuple[int, int]", node.args[1:3])
    axes[first], axes[second] = axes[second], axes[first]
    return axes


def _arithmetic(node: Node) -> Node | None:
    if node.kwargs or len(node.args) != 2:
        return None
    kept, other = node.args
    if not isinstance(kept, Node):
        kept, other = other, kept
        if is_call(node, aten.div.Tensor, aten.sub.Tensor):
            return None
    if not is_tensor(kept) or number(other) != _NEUTRAL[node.target]:
        return None
    return kept if dtype_of(kept) == dtype_of(node) else None


def _cat(node: Node) -> Node | None:
    pieces = cast("list[Node]", node.args[0])
    dim = cast(int, argument(node, "dim"))
    kept = [piece for piece in pieces if not _is_empty(piece, dim, rank(node))]
    if len(kept) == 1 and dtype_of(kept[0]) == dtype_of(node):
        return kept[0]
    if 1 < len(kept) < len(pieces) and {dtype_of(p) for p in kept} == {dtype_of(node)}:
        node.update_arg(0, kept)
    return None


def _is_empty(piece: Node, dim: int, axes: int) -> bool:
    shape = value_of(piece).shape
    # An old rule lets a piece of shape [0] stand among pieces of any rank.
    return len(shape) != axes or expr(shape[dim]).is_zero is True


_RULES: dict[Any, Callable[[Node], Node | None]] = {
    **dict.fromkeys(_CASTS | {aten.to.dtype}, _cast),
    **dict.fromkeys(_DROPOUTS, _dropout),
    **dict.fromkeys(_ALIASES, _always),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys((aten.contiguous.default, aten.clone.default), _layout),
    **dict.fromkeys(_PERMUTES, _permute),
    **dict.fromkeys(_NEUTRAL, _arithmetic),
    aten.cat.default: _cat,
}
