"""Rotary position embedding that is spelled out becomes ``fxgraft::rotary``.

1. ``x * cos + turn(x) * sin`` with ``turn`` swapping the halves of the channels (Llama,
   GPT-NeoX) or neighbouring channels (GPT-J, Cohere, GLM) and negating one of the two; ``sin`` is
   negated where the model turns the other way.
2. ``(a cos - b sin, b cos + a sin)`` joined or zipped, with a and b the halves or the even and odd
   channels (gpt-oss, DeepSeek); cosines and sines are doubled once for all layers.
3. Pairs of channels multiplied as complex numbers (Llama 4, DeepSeek-V2).
4. A cast back that follows is taken in, and so is the concatenation with the channels that do not
   rotate.
5. [B, S, H, D] is transposed to the op's [B, H, S, D] and back, both views.

Cosines and sines must provably hold every angle twice, as the op states: kernels and exports may
read half of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch.fx import Graph, Node

from fxgraft import graph as graphs
from fxgraft.kernels.rotary.op import SPEC
from fxgraft.kernels.spec import dims
from fxgraft.passes.optimize import angles, effects, layouts
from fxgraft.passes.optimize.matching import (
    FLATTENING,
    Part,
    aten,
    calls,
    dtype_of,
    halves,
    is_call,
    is_tensor,
    joined,
    last_size,
    part,
    products,
    single_user,
    source,
    sums,
    uncast,
    width,
    zipped,
)
from fxgraft.program import Program


@dataclass(frozen=True)
class _Rotation:
    """A rotation as found.

    Attributes:
        x: what is rotated, or its two parts that are to be joined first.
        cos, sin: as the model multiplies by them.
        result: the last node of the pattern.
        interleaved: see the op.
        turns_back: whether the angle counts the other way.
        is_half: whether cos and sin hold every angle once.
    """

    x: Node | tuple[Node, Node]
    cos: Node
    sin: Node
    result: Node
    interleaved: bool
    turns_back: bool = False
    is_half: bool = False


def rewrite(program: Program) -> int:
    """Fuse every rotation.

    Returns:
        How many there were.
    """
    graph = program.graph
    written = effects.written(graph)
    doubled: dict[tuple[Node, bool], Node] = {}
    count = sum(
        _fuse(rotation, doubled)
        for rotation in _find(graph)
        if effects.untouched(rotation.result, written)
    )
    if count:
        effects.drop_unread(graph)
    return count


def _find(graph: Graph) -> Iterator[_Rotation]:
    for node in calls(graph, aten.add.Tensor, aten.sub.Tensor):
        rotation = _sum_form(node)
        if rotation is not None:
            yield rotation
    for node in calls(graph, aten.cat.default, *FLATTENING):
        rotation = _pair_form(node)
        if rotation is not None:
            yield rotation
    made: dict[tuple[Node, bool], Node] = {}
    for node in calls(graph, aten.view_as_real.default):
        rotation = _complex_form(node, made)
        if rotation is not None:
            yield rotation


def _sum_form(node: Node) -> _Rotation | None:
    """Rule 1."""
    orders: Iterator[tuple[Any, Any]] = sums(node)
    is_difference = is_call(node, aten.sub.Tensor)
    if is_difference and len(node.args) == 2 and not node.kwargs:
        orders = iter([(node.args[0], node.args[1])])
    for plain, turned in orders:
        for quarter, sin in products(turned):
            turn = _turn(quarter)
            cos = None if turn is None else _other_factor(plain, turn.x)
            if turn is None or not is_tensor(cos) or not is_tensor(sin):
                continue
            back = turn.back != is_difference
            return _Rotation(turn.x, cos, sin, node, turn.interleaved, back)
    return None


@dataclass(frozen=True)
class _Turn:
    x: Node
    interleaved: bool
    back: bool


def _turn(node: object) -> _Turn | None:
    """x of (-b, a), or of (b, -a) which turns back, for a and b the two parts of x."""
    for pair, interleaved in ((joined(node), False), (zipped(node), True)):
        if pair is None:
            continue
        for back, (negated, kept) in enumerate((pair, pair[::-1])):
            if not is_call(negated, aten.neg.default):
                continue
            first, second = (source(negated), kept) if back else (kept, source(negated))
            whole = halves(first, second)
            if whole is not None and whole[1] == interleaved:
                return _Turn(whole[0], interleaved, bool(back))
    return None


def _other_factor(node: object, factor: Node) -> object:
    return next((b for a, b in products(node) if a is factor), None)


def _pair_form(node: Node) -> _Rotation | None:
    """Rule 2."""
    pair, interleaved = joined(node), False
    if pair is None:
        pair, interleaved = zipped(node), True
    difference = None if pair is None else pair[0]
    if pair is None or not is_call(difference, aten.sub.Tensor) or len(difference.args) != 2:
        return None
    first, second = difference.args
    for (a, cos), (b, sin), (left, right) in product(
        products(first), products(second), sums(pair[1])
    ):
        if _other_factor(left, b) is cos and _other_factor(right, a) is sin:
            return _from_parts(node, (a, b), (cos, sin), interleaved)
    return None


def _from_parts(
    node: Node, parts: tuple[Any, Any], factors: tuple[Any, Any], interleaved: bool
) -> _Rotation | None:
    if not all(is_tensor(value) for value in (*parts, *factors)):
        return None
    whole = halves(*parts)
    if whole is not None and whole[1] == interleaved:
        return _Rotation(whole[0], *factors, node, interleaved, is_half=True)
    # Other channels than the output's are paired: put them in the output's order first.
    return None if interleaved else _Rotation(parts, *factors, node, interleaved, is_half=True)


def _complex_form(node: Node, made: dict[tuple[Node, bool], Node]) -> _Rotation | None:
    """Rule 3."""
    result = single_user(node)
    if result is None or not is_call(result, *FLATTENING) or dims(result)[:-1] != dims(node)[:-2]:
        return None
    for turned, circle in products(source(node)):
        pairs = source(turned) if is_call(turned, aten.view_as_complex.default) else None
        x = source(pairs) if is_call(pairs, aten.reshape.default, aten.view.default) else None
        if x is None or pairs is None or not is_tensor(circle):
            continue
        if dims(pairs)[:-2] == dims(x)[:-1] and angles.layout(x, circle) is not None:
            cos, sin = angles.real_parts(circle, made)
            return _Rotation(x, cos, sin, result, interleaved=True, is_half=True)
    return None


def _fuse(rotation: _Rotation, doubled: dict[tuple[Node, bool], Node]) -> bool:
    first = rotation.x if isinstance(rotation.x, Node) else rotation.x[0]
    layout = angles.layout(first, rotation.cos)
    if layout is None or angles.layout(first, rotation.sin) != layout:
        return False
    if not _has_valid_angles(rotation):
        return False
    cos, sin = _angles(rotation, layout, doubled)
    rotation = _grow(_join(rotation))
    assert isinstance(rotation.x, Node)
    x, result = rotation.x, rotation.result
    if dtype_of(x) != dtype_of(result):
        x = graphs.insert(result, aten.to.dtype, (x, dtype_of(result)))
    if layout == "sequence_first":
        x = graphs.insert(result, aten.transpose.int, (x, 1, 2))
    keywords = {"interleaved": True} if rotation.interleaved else {}
    fused = graphs.insert(result, SPEC.overload, (x, cos, sin), keywords)
    if layout == "sequence_first":
        fused = graphs.insert(result, aten.transpose.int, (fused, 1, 2))
    layouts.replace(result, fused)
    return True


def _has_valid_angles(rotation: _Rotation) -> bool:
    wanted = last_size(rotation.x if isinstance(rotation.x, Node) else rotation.x[0])
    if rotation.is_half and isinstance(rotation.x, Node):
        wanted = wanted / 2
    if last_size(rotation.cos) != wanted or last_size(rotation.sin) != wanted:
        return False
    if rotation.is_half:
        return True
    return all(
        angles.is_doubled(node, interleaved=rotation.interleaved)
        for node in (rotation.cos, rotation.sin)
    )


def _angles(
    rotation: _Rotation, layout: angles.Layout, doubled: dict[tuple[Node, bool], Node]
) -> tuple[Node, Node]:
    found: list[Node] = []
    for node in (rotation.cos, rotation.sin):
        if rotation.is_half:
            node = angles.double(node, interleaved=rotation.interleaved, made=doubled)
        node = angles.as_rank_four(node)
        if layout == "sequence_first":
            node = graphs.insert(node, aten.transpose.int, (node, 1, 2), after=True)
        found.append(node)
    cos, sin = found
    if rotation.turns_back:
        sin = graphs.insert(sin, aten.neg.default, (sin,), after=True)
    return cos, sin


def _join(rotation: _Rotation) -> _Rotation:
    if isinstance(rotation.x, Node):
        return rotation
    pieces = list(rotation.x)
    return replace(rotation, x=graphs.insert(rotation.result, aten.cat.default, (pieces, -1)))


def _grow(rotation: _Rotation) -> _Rotation:
    """Rule 4."""
    user = single_user(rotation.result)
    assert isinstance(rotation.x, Node)
    narrow = uncast(rotation.x)
    if narrow is not rotation.x and is_call(user, aten.to.dtype):
        if dtype_of(user) != dtype_of(narrow):
            return rotation
        rotation = replace(rotation, x=narrow, result=user)
        user = single_user(user)
    assert isinstance(rotation.x, Node)
    turned, pieces = part(rotation.x), joined(user)
    if turned is None or pieces is None or user is None or turned.start or turned.step != 1:
        return rotation
    rest = Part(turned.whole, turned.size, 1, width(turned.whole) - turned.size)
    if pieces[0] is not rotation.result or part(pieces[1]) != rest:
        return rotation
    return replace(rotation, x=turned.whole, result=user)
