"""Experts: products of rows with one of several matrices each, and where their results meet.

Every process keeps some channels of every expert. A token's results from its experts are partial
sums; they are added up over the processes only after they were weighted and put together, which
moves one row per token instead of one per token and expert.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft.kernels.spec import dims
from fxgraft.passes.prune_heads.heads import moves_data, op_name

_GROUPED = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})
_SUMS = frozenset({"aten::sum"})
_SCALINGS = frozenset({"aten::mul", "aten::mul_"})


def is_grouped(node: Node) -> bool:
    """Whether a node multiplies rows [M, in] by one of several matrices [E, in, out] each."""
    return op_name(node) in _GROUPED


def stored_weight(node: Node) -> tuple[Node, bool] | None:
    """The weight behind a grouped product, and whether it is stored as [E, out, in]."""
    weight = node.args[1]
    assert isinstance(weight, Node)
    turned = op_name(weight) == "aten::transpose"
    if turned and {cast(int, dim) % 3 for dim in weight.args[1:3]} == {1, 2}:
        weight = weight.all_input_nodes[0]
    return (weight, turned) if weight.op == "get_attr" and len(dims(weight)) == 3 else None


def bias_of(node: Node) -> tuple[Node, Node] | None:
    """Of a grouped product plus a row of a stored bias [E, out]: the product and the rows."""
    if op_name(node) not in ("aten::add", "aten::add_") or node.kwargs or len(node.args) != 2:
        return None
    product, rows = node.args
    if not isinstance(product, Node) or not isinstance(rows, Node):
        return None
    if not is_grouped(product) or op_name(rows) != "aten::index":
        return None
    chosen = cast("list[object]", rows.args[1])
    is_stored = rows.all_input_nodes[0].op == "get_attr" and len(chosen) == 1
    return (product, rows) if is_stored and list(product.users) == [node] else None


def free(node: Node) -> None:
    """Make an addition in place an ordinary one, so that it goes when nothing reads it any more.

    Nothing else reads the product that it would change.
    """
    if op_name(node) == "aten::add_":
        node.target = torch.ops.aten.add.Tensor


def with_bias(node: Node) -> Node:
    """The node that adds a grouped product's bias, else the node itself."""
    users = list(node.users)
    return users[0] if len(users) == 1 and bias_of(users[0]) is not None else node


def meeting(node: Node) -> Node:
    """The last node that partial sums reach through what treats a sum like its parts."""
    while True:
        users = [user for user in node.users if isinstance(user.meta.get("val"), Tensor)]
        if len(users) != 1 or not _keeps_sums(users[0], node):
            return node
        node = users[0]


def _keeps_sums(user: Node, source: Node) -> bool:
    """Whether f(a + b) = f(a) + f(b) for the function of ``source`` that ``user`` computes."""
    if user.meta["val"].dtype != source.meta["val"].dtype:
        return False
    name = op_name(user)
    if name == "aten::index" or moves_data(user) or name in _SUMS:
        return user.args[0] is source
    return name in _SCALINGS and list(user.args).count(source) == 1
