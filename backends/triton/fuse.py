"""Fusions of a paged graph into the ops that have kernels for few rows.

1. A linear layer, also one with an N:M sparse weight, takes in the RMS norm before it, if only
   such layers read that norm.
2. Then the gated activation behind it, if the layer computes gate and up in one product.
3. Then the sum with the residual stream behind it.
4. Attention over blocks takes in the score and the gate of its heads (``fuse_gate``).
5. Then the rotary embedding of its queries and keys.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from fxgraft import graph as graphs
from fxgraft.backends.triton.fuse_gate import fuse_gate
from fxgraft.kernels.spec import argument, dims, set_argument
from fxgraft.paging import PagedProgram

aten = torch.ops.aten
fx = torch.ops.fxgraft


def fused(paged: PagedProgram, *, fresh: bool) -> GraphModule:
    """A paged graph with its fusions applied.

    Args:
        paged: is not changed; weights are shared.
        fresh: for rows without a past: attention is told so.
    """
    module = paged.program.copy().graph_module
    with graphs.no_collection():
        for node in list(module.graph.nodes):
            if node.target is aten.linear.default and _has_weight(node):
                _fuse_linear(node)
            elif node.target is fx.nm_linear.default:
                _fuse_nm_linear(node)
            elif node.target is fx.paged_attention.default:
                fuse_gate(node)
                _fuse_rotary(node)
                if fresh:
                    set_argument(node, "longest_past", 0)
        graphs.finish(module)
    return module


def _has_weight(node: Node) -> bool:
    weight = node.args[1]
    return isinstance(weight, Node) and weight.op == "get_attr" and len(dims(weight)) == 2


def _fuse_linear(node: Node) -> None:
    x, norm, kwargs = _before(node)
    place, activation, residual = _behind(node)
    if activation is not None:
        kwargs["activation"] = activation
    args = (x, node.args[1], argument(node, "bias"), norm, residual)
    _replace(place, fx.fused_linear.default, args, kwargs)


def _fuse_nm_linear(node: Node) -> None:
    if any(argument(node, name) is not None for name in ("residual", "activation", "eps", "ends")):
        return
    x, norm, kwargs = _before(node)
    place, activation, residual = _behind(node)
    if place is node and not kwargs:
        return
    if activation is not None:
        kwargs["activation"] = activation
    args = (x, *node.args[1:3], argument(node, "bias"), residual, norm)
    pattern = {name: argument(node, name) for name in ("n", "m")}
    _replace(place, fx.nm_linear.default, args, pattern | kwargs)


def _replace(
    place: Node, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    call = graphs.insert(place, target, args, kwargs)
    place.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)


def _before(node: Node) -> tuple[Node, Node | None, dict[str, Any]]:
    """What a product reads, x, or the norm before it does; the norm's weight and its options."""
    x, weight = cast("tuple[Node, Node]", node.args[:2])
    if x.target is not fx.rms_norm.default or not _all_linear(x) or not _one_dtype(x, weight):
        return x, None, {}
    options = {"eps": argument(x, "eps"), "norm_offset": argument(x, "offset")}
    return cast(Node, argument(x, "x")), cast("Node | None", argument(x, "weight")), options


def _behind(node: Node) -> tuple[Node, object, Node | None]:
    """Gated activation and residual behind a product.

    Returns:
        The last node of what can be one call, the activation's name or None, and the residual.
    """
    place, activation = node, None
    gated = _gated_behind(node)
    if gated is not None:
        activation = argument(gated, "activation")
        place = gated
    residual = None
    total = _only_user(place)
    if total is not None and _is_residual_sum(total, place):
        residual = next(n for n in cast("list[Node]", list(total.args)) if n is not place)
        place = total
    return place, activation, residual


def _all_linear(norm: Node) -> bool:
    return all(user.args[0] is norm and _takes_norm(user) for user in norm.users)


def _takes_norm(node: Node) -> bool:
    if node.target is fx.nm_linear.default:
        return argument(node, "ends") is None
    return node.target is aten.linear.default and _has_weight(node)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _gated_behind(node: Node) -> Node | None:
    """The activation that reads both halves of a product, gate first."""
    split = _only_user(node)
    if split is None or split.target is not aten.split_with_sizes.default:
        return None
    sizes = cast("list[int]", split.args[1])
    if len(sizes) != 2 or sizes[0] != sizes[1] or argument(split, "dim") not in (-1, 2):
        return None
    parts = {user.args[1]: user for user in split.users if user.target is operator.getitem}
    if set(parts) != {0, 1} or len(split.users) != 2:
        return None
    user = _only_user(parts[0])
    if user is None or user is not _only_user(parts[1]):
        return None
    if user.target is not fx.gated_activation.default:
        return None
    halves = (argument(user, "gate"), argument(user, "up"))
    return user if halves == (parts[0], parts[1]) else None


def _is_residual_sum(node: Node, product: Node) -> bool:
    if node.target is not aten.add.Tensor or argument(node, "alpha") != 1:
        return False
    others = [value for value in node.args if value is not product]
    if len(others) != 1 or not isinstance(others[0], Node):
        return False
    value = others[0].meta["val"]
    own = product.meta["val"]
    return (
        isinstance(value, torch.Tensor)
        and dims(others[0]) == dims(product)
        and value.dtype == own.dtype
    )


def _one_dtype(norm: Node, weight: Node) -> bool:
    values = [weight, argument(norm, "x"), argument(norm, "weight")]
    return len({value.meta["val"].dtype for value in values if isinstance(value, Node)}) == 1


def _fuse_rotary(node: Node) -> None:
    query, key = argument(node, "query"), argument(node, "key")
    if not (isinstance(query, Node) and isinstance(key, Node)):
        return
    both = (query, key)
    if any(part.target is not fx.rotary.default or len(part.users) != 1 for part in both):
        return
    names = ("cos", "sin", "interleaved")
    if any(argument(query, name) != argument(key, name) for name in names):
        return
    for name in names:
        set_argument(node, name, argument(query, name))
    set_argument(node, "query", argument(query, "x"))
    set_argument(node, "key", argument(key, "x"))
