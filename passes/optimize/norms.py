"""Root-mean-square normalisation that is spelled out becomes ``fxgraft::rms_norm``.

1. ``x * rsqrt(mean(x², -1) + eps)`` in any of its spellings: the square as ``pow`` or product,
   the root as ``rsqrt``, ``pow(-0.5)`` or a division by ``sqrt``, products in either order.
2. A cast back to x's dtype and then a weight [D]: Llama's order, the op's own.
3. A weight [D] before any cast (Gemma): the op then works in the wide dtype and the cast stays.
4. A weight w + 1 becomes the op's ``offset``. A weight of another shape stays outside.
5. Where x is y - mean(y), the whole is a layer normalisation and becomes ``aten.layer_norm``.
6. ``aten.rms_norm`` of a float32 or float64 tensor.

So the result is the same to the last rounding step in every dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.kernels.rms_norm.op import SPEC
from fxgraft.kernels.spec import argument, dims
from fxgraft.passes.optimize import effects, layouts
from fxgraft.passes.optimize.matching import (
    aten,
    calls,
    dtype_of,
    is_call,
    is_last,
    is_tensor,
    last_size,
    number,
    operand_pairs,
    products,
    rank,
    same_size,
    single_user,
    source,
    sums,
    uncast,
)
from fxgraft.program import Program


@dataclass(frozen=True)
class _Norm:
    """A normalisation as found.

    Attributes:
        x: what is normalised.
        result: the last node of the pattern.
        eps: added to the mean of squares.
        weight: [D], or None.
        offset: added to the weight.
    """

    x: Node
    result: Node
    eps: float
    weight: Node | None = None
    offset: float = 0.0


def rewrite(program: Program) -> int:
    """Fuse every normalisation.

    Returns:
        How many there were.
    """
    graph, count = program.graph, 0
    written = effects.written(graph)
    for root in calls(graph, aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar):
        for norm in _spelled_out(root):
            count += _fuse(norm, written)
    for node in calls(graph, aten.rms_norm.default):
        norm = _library(node)
        count += norm is not None and _fuse(norm, written)
    if count:
        effects.drop_unread(graph)
    return count


def _fuse(norm: _Norm, written: frozenset[Node]) -> bool:
    if norm.x in written or not effects.untouched(norm.result, written):
        return False
    layouts.replace(norm.result, _insert(norm))
    return True


def _spelled_out(root: Node) -> list[_Norm]:
    variance = source(root)
    if is_call(root, aten.pow.Tensor_Scalar) and number(root.args[1]) != -0.5:
        return []
    for mean, eps in sums(variance):
        x = _mean_of_squares(mean)
        if x is not None and number(eps) is not None:
            scaled = [user for user in root.users if _is_scaled(user, x, root)]
            return [_grow(_Norm(x, user, float(eps))) for user in scaled]
    return []


def _mean_of_squares(node: object) -> Node | None:
    """x of mean(x², -1, keepdim=True)."""
    if not is_call(node, aten.mean.dim) or node.kwargs or len(node.args) != 3:
        return None
    square, axes, keepdim = node.args
    if not keepdim or not isinstance(axes, (list, tuple)) or len(axes) != 1:
        return None
    if not is_tensor(square) or not is_last(square, axes[0]):
        return None
    if is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2:
        return source(square)
    if is_call(square, aten.square.default):
        return source(square)
    same = next((a for a, b in products(square) if a is b), None)
    return same if isinstance(same, Node) else None


def _is_scaled(user: Node, x: Node, root: Node) -> bool:
    """Whether a node is x, before or after a cast to the dtype it is squared in, over the root."""
    if dtype_of(user) != dtype_of(x):
        return False
    if is_call(root, aten.sqrt.default):
        return is_call(user, aten.div.Tensor) and user.args == (x, root)
    return any(b is root and (a is x or a is uncast(x)) for a, b in products(user))


def _grow(norm: _Norm) -> _Norm:
    """Take in the cast and the weight that follow, if the op computes just that."""
    narrow = uncast(norm.x)
    cast = single_user(norm.result)
    if narrow is not norm.x and is_call(cast, aten.to.dtype) and dtype_of(cast) == dtype_of(narrow):
        norm = replace(norm, x=narrow, result=cast)
    user = single_user(norm.result)
    for normalised, weight in products(user):
        if user is not None and normalised is norm.result and _is_weight(weight, user, norm):
            weight, offset = _split_offset(weight)
            return replace(norm, result=user, weight=weight, offset=offset)
    return norm


def _is_weight(weight: object, user: Node, norm: _Norm) -> bool:
    if not is_tensor(weight) or rank(weight) != 1:
        return False
    return dims(weight) == dims(norm.x)[-1:] and same_size(user, norm.x)


def _split_offset(weight: Node) -> tuple[Node, float]:
    for stored, offset in operand_pairs(weight, aten.add.Tensor, aten.add.Scalar):
        if is_tensor(stored) and rank(stored) == 1 and number(offset) is not None:
            return stored, float(offset)
    return weight, 0.0


def _library(node: Node) -> _Norm | None:
    x, eps, weight = source(node), argument(node, "eps"), argument(node, "weight")
    if x is None or len(argument(node, "normalized_shape")) != 1:  # pyright: ignore[reportArgumentType]
        return None
    # In narrow dtypes the library multiplies by the weight before it rounds.
    if dtype_of(x) not in (torch.float32, torch.float64):
        return None
    eps = torch.finfo(dtype_of(x)).eps if eps is None else number(eps)
    assert eps is not None
    return _Norm(x, node, eps, weight if isinstance(weight, Node) else None)


def _insert(norm: _Norm) -> Node:
    centred = _centred(norm.x)
    weight_fits = norm.weight is None or dtype_of(norm.weight) == dtype_of(norm.x)
    if centred is not None and norm.offset == 0 and weight_fits:
        width = int(last_size(norm.x))  # pyright: ignore[reportArgumentType]
        args = (centred, [width], norm.weight, None, norm.eps)
        return graphs.insert(norm.result, aten.layer_norm.default, args)
    keywords = {"eps": norm.eps} | ({"offset": norm.offset} if norm.offset else {})
    args = (norm.x,) if norm.weight is None else (norm.x, norm.weight)
    return graphs.insert(norm.result, SPEC.overload, args, keywords)


def _centred(x: Node) -> Node | None:
    """y of y - mean(y, -1, keepdim=True)."""
    if not is_call(x, aten.sub.Tensor) or x.kwargs or not last_size(x).is_Integer:
        return None
    y, mean = x.args
    if not is_call(mean, aten.mean.dim) or mean.kwargs or len(mean.args) != 3:
        return None
    return source(x) if mean.args[0] is y and mean.args[1] == [-1] and mean.args[2] else None
