"""Cosines and sines of a rotary position embedding: what shape and order of channels they have."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.kernels.spec import argument, dims
from fxgraft.passes.optimize.matching import (
    aten,
    is_call,
    is_last,
    is_tensor,
    joined,
    last_size,
    number,
    rank,
    source,
    zipped,
)

Layout = Literal["heads_first", "sequence_first"]

_ELEMENTWISE = frozenset({
    aten.cos.default, aten.sin.default, aten.neg.default, aten.to.dtype, aten.mul.Scalar,
    aten.contiguous.default, aten.clone.default,
})  # fmt: skip
_ALONG_DIM = frozenset({aten.slice.Tensor, aten.select.int, aten.unsqueeze.default})


def is_doubled(node: Node, *, interleaved: bool) -> bool:
    """Whether every angle provably stands twice along the last dimension.

    Args:
        node: cosines or sines.
        interleaved: twice in a row, instead of in one run after the other.
    """
    found: object = node
    while is_tensor(found):
        twins = zipped(found) if interleaved else joined(found)
        if twins is not None:
            return twins[0] is twins[1]
        if is_call(found, aten.repeat_interleave.self_int):
            return interleaved and _repeats_twice(found)
        found = _before(found)
    return False


def _repeats_twice(node: Node) -> bool:
    return argument(node, "repeats") == 2 and is_last(node, argument(node, "dim"))


def _before(node: Node) -> object:
    """The tensor whose last dimension has the same order of channels as the node's."""
    before = source(node)
    if before is None or node.op != "call_function":
        return None
    if node.target in _ELEMENTWISE:
        return before
    if node.target in _ALONG_DIM:
        dim = argument(node, "dim")
        owner = node if is_call(node, aten.unsqueeze.default) else before
        return None if is_last(owner, dim) else before
    if is_call(node, aten.mul.Tensor):
        return _scaled(node)
    if is_call(node, aten.expand.default, aten.view.default, aten.reshape.default):
        return before if last_size(before) == last_size(node) else None
    return None


def _scaled(node: Node) -> object:
    first, second = node.args[:2]
    for kept, factor in ((first, second), (second, first)):
        if number(factor) is not None:
            return kept
        if is_tensor(factor) and (rank(factor) == 0 or last_size(factor) == 1):
            return kept
    return None


def double(node: Node, *, interleaved: bool, made: dict[tuple[Node, bool], Node]) -> Node:
    """Let every angle stand twice along the last dimension.

    Args:
        node: cosines or sines [..., R/2].
        interleaved: twice in a row, instead of in one run after the other.
        made: what was doubled before, so that all layers share it.

    Returns:
        [..., R].
    """
    known = made.get((node, interleaved))
    if known is not None:
        return known
    if interleaved:
        args: tuple[Any, ...] = (node, 2, rank(node) - 1)
        doubled = graphs.insert(node, aten.repeat_interleave.self_int, args, after=True)
    else:
        doubled = graphs.insert(node, aten.cat.default, ([node, node], -1), after=True)
    made[node, interleaved] = doubled
    return doubled


def real_parts(angles: Node, made: dict[tuple[Node, bool], Node]) -> tuple[Node, Node]:
    """Cosines and sines of complex numbers on the circle, without complex arithmetic if possible.

    Args:
        angles: complex [..., R/2].
        made: what was inserted before; True marks the sines.
    """
    cos, sin = (_real_part(angles, is_sin, made) for is_sin in (False, True))
    return cos, sin


def _real_part(node: Node, is_sin: bool, made: dict[tuple[Node, bool], Node]) -> Node:
    if (node, is_sin) not in made:
        made[node, is_sin] = _make_real_part(node, is_sin, made)
    return made[node, is_sin]


def _make_real_part(node: Node, is_sin: bool, made: dict[tuple[Node, bool], Node]) -> Node:
    before = source(node)
    if is_call(node, aten.polar.default):
        length, angle = node.args
        function = aten.sin.default if is_sin else aten.cos.default
        part = graphs.insert(node, function, (angle,))
        if is_call(length, aten.ones_like.default):
            return part
        return graphs.insert(node, aten.mul.Tensor, (length, part))
    is_plain = is_call(node, *_ALONG_DIM) or (
        is_call(node, aten.mul.Tensor) and number(node.args[1]) is not None
    )
    if before is not None and is_plain:
        real = _real_part(before, is_sin, made)
        return graphs.insert(node, cast(Any, node.target), (real, *node.args[1:]))
    pairs = graphs.insert(node, aten.view_as_real.default, (node,), after=True)
    return graphs.insert(pairs, aten.select.int, (pairs, -1, int(is_sin)), after=True)


def layout(x: Node, angles: Node) -> Layout | None:
    """How x is laid out, judged by how the angles broadcast against it.

    Args:
        x: queries or keys [B, H, S, D] (heads first) or [B, S, H, D] (sequence first).
        angles: cosines or sines that x is multiplied by.
    """
    if rank(x) != 4:
        return None
    shape, sizes = dims(x), (1,) * (4 - rank(angles)) + dims(angles)
    if len(sizes) != 4 or sizes[0] not in (1, shape[0]):
        return None
    if sizes[1] == 1 and sizes[2] == shape[2]:
        return "heads_first"
    return "sequence_first" if sizes[2] == 1 and sizes[1] == shape[1] else None


def as_rank_four(angles: Node) -> Node:
    """Give angles [S, R] or [1, S, R] the shape [1, 1, S, R] that broadcasting gave them."""
    while rank(angles) < 4:
        angles = graphs.insert(angles, aten.unsqueeze.default, (angles, 0), after=True)
    return angles
