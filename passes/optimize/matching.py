"""Small questions about graph nodes that the rewrites share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch.fx import Graph, Node

from fxgraft.kernels.spec import Expr, argument, dims, expr

aten = torch.ops.aten
_SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
# May turn [..., n, 2] into [..., 2 n]; the shapes have to be looked at.
FLATTENING = (
    aten.flatten.using_ints, aten.reshape.default, aten.view.default, aten.reshape_as.default,
    aten.view_as.default,
)  # fmt: skip


def calls(graph: Graph, *targets: Callable[..., Any]) -> list[Node]:
    """All calls of these operators, in graph order per operator."""
    return [n for t in targets for n in graph.find_nodes(op="call_function", target=t)]


def is_call(value: object, *targets: Callable[..., Any]) -> TypeGuard[Node]:
    """Whether ``value`` is a node that calls one of the operators."""
    return isinstance(value, Node) and value.op == "call_function" and value.target in targets


def is_tensor(value: object) -> TypeGuard[Node]:
    """Whether ``value`` is a node whose value is one tensor."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor)


def value_of(node: Node) -> torch.Tensor:
    """The fake tensor of a node."""
    return cast(torch.Tensor, node.meta["val"])


def dtype_of(node: Node) -> torch.dtype:
    """Element type of a node's tensor."""
    return value_of(node).dtype


def source(node: Node, index: int = 0) -> Node | None:
    """The node passed as positional argument ``index``, or None for anything else."""
    value = node.args[index] if len(node.args) > index else None
    return value if isinstance(value, Node) else None


def number(value: object) -> float | None:
    """A Python number as float, or None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else None  # pyright: ignore[reportArgumentType]


def same_size(first: Node, second: Node) -> bool:
    """Whether two tensors have the same shape at every size of the dynamic dimensions."""
    return dims(first) == dims(second)


def rank(node: Node) -> int:
    """Number of dimensions."""
    return value_of(node).dim()


def is_last(node: Node, dim: object) -> bool:
    """Whether ``dim`` is the last dimension of a node's tensor."""
    return dim in (-1, rank(node) - 1)


def last_size(node: Node) -> Expr:
    """Size of the last dimension."""
    return dims(node)[-1]


def single_user(node: Node) -> Node | None:
    """The only node that reads ``node`` (once or more), or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def operand_pairs(node: object, *targets: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
    """Both orders of the two operands of a commutative call; nothing for another node."""
    if is_call(node, *targets) and len(node.args) == 2 and not node.kwargs:
        first, second = node.args
        yield first, second
        yield second, first


def products(node: object) -> Iterator[tuple[Any, Any]]:
    """Both orders of the factors of a product."""
    return operand_pairs(node, aten.mul.Tensor, aten.mul.Scalar)


def sums(node: object) -> Iterator[tuple[Any, Any]]:
    """Both orders of the terms of a sum."""
    return operand_pairs(node, aten.add.Tensor, aten.add.Scalar)


def uncast(node: Node) -> Node:
    """The node before a cast to another dtype, or the node itself."""
    before = source(node) if is_call(node, aten.to.dtype) else None
    return node if before is None else before


@dataclass(frozen=True)
class Part:
    """A slice along the last dimension: ``whole[..., start : start + step * size : step]``."""

    whole: Node
    start: int
    step: int
    size: int


def part(node: object) -> Part | None:
    """What slice of the last dimension of which tensor a node is, however it was written.

    Understands slices, pieces of a split or chunk, and one of a pair of neighbours taken by
    ``unbind`` or ``select`` from a view as [..., n, 2].
    """
    if not is_tensor(node) or not rank(node) or not last_size(node).is_Integer:
        return None
    if is_call(node, aten.slice.Tensor):
        return _slice(node)
    if is_call(node, operator.getitem):
        return _piece(node)
    if is_call(node, aten.select.int):
        return _neighbour(node, source(node), argument(node, "dim"), argument(node, "index"))
    return None


def width(node: Node) -> int:
    """Size of the last dimension, which is not dynamic."""
    return int(cast(Any, last_size(node)))


def _slice(node: Node) -> Part | None:
    whole, start, step = source(node), argument(node, "start") or 0, argument(node, "step")
    if whole is None or not is_last(whole, argument(node, "dim")):
        return None
    if not isinstance(start, int) or not isinstance(step, int) or not last_size(whole).is_Integer:
        return None
    start = start + width(whole) if start < 0 else start
    return Part(whole, start, step, width(node))


def _piece(node: Node) -> Part | None:
    pieces, index = node.args
    if is_call(pieces, aten.unbind.int):
        return _neighbour(node, source(pieces), argument(pieces, "dim"), index)
    if not is_call(pieces, *_SPLITS):
        return None
    whole = source(pieces)
    if whole is None or not is_last(whole, argument(pieces, "dim")):
        return None
    widths = [expr(value.shape[-1]) for value in pieces.meta["val"]]
    if not isinstance(index, int) or not all(width.is_Integer for width in widths):
        return None
    return Part(whole, int(cast(Any, sum(widths[:index]))), 1, width(node))


def _neighbour(node: Node, pairs: Node | None, dim: object, index: object) -> Part | None:
    if pairs is None or not is_last(pairs, dim) or not isinstance(index, int):
        return None
    views = (aten.view.default, aten.reshape.default, aten.unflatten.int)
    whole = source(pairs) if is_call(pairs, *views) else None
    if whole is None or dims(pairs)[:-2] != dims(whole)[:-1] or last_size(pairs) != 2:
        return None
    return Part(whole, index % 2, 2, width(node))


def halves(first: object, second: object) -> tuple[Node, bool] | None:
    """The tensor whose channels ``first`` and ``second`` are, and whether they alternate.

    Returns:
        (x, False) if they are x's first and second half, (x, True) if they are its even and odd
        channels, None otherwise.
    """
    a, b = part(first), part(second)
    if a is None or b is None or a.whole is not b.whole or a.size != b.size:
        return None
    if 2 * a.size != last_size(a.whole) or a.step != b.step or a.start != 0:
        return None
    if a.step == 1 and b.start == a.size:
        return a.whole, False
    return (a.whole, True) if a.step == 2 and b.start == 1 else None


def zipped(node: object) -> tuple[object, object] | None:
    """(a, b) if a node is a and b with alternating channels: ``stack((a, b), -1).flatten(-2)``."""
    stack = source(node) if is_call(node, *FLATTENING) else None
    if not is_tensor(node) or not is_call(stack, aten.stack.default):
        return None
    if not is_last(stack, argument(stack, "dim")) or dims(node)[:-1] != dims(stack)[:-2]:
        return None
    return _two(stack)


def joined(node: object) -> tuple[object, object] | None:
    """(a, b) if a node is a and b one after the other: ``cat((a, b), -1)``."""
    if not is_call(node, aten.cat.default) or not is_last(node, argument(node, "dim")):
        return None
    return _two(node)


def _two(node: Node) -> tuple[object, object] | None:
    pieces = node.args[0]
    if not isinstance(pieces, (list, tuple)) or len(pieces) != 2:
        return None
    return pieces[0], pieces[1]
