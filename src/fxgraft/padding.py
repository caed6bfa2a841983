"""What a step graph asks about padding, and what of it has an answer where rows hold none."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import cast

import torch
from torch.fx import Node

from fxgraft.kernels.spec import argument, dims
from fxgraft.program import Program

aten = torch.ops.aten
_MASK_OPS = frozenset({
    aten.to.dtype, aten.to.device, aten._to_copy.default, aten.to.dtype_layout, aten.ne.Scalar,
    aten.slice.Tensor, aten.alias.default, aten.bitwise_and.Tensor, aten.contiguous.default,
})  # fmt: skip


def mask_nodes(program: Program) -> set[Node]:
    """Nodes that say no more than which past tokens are real."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name == "attention_mask":
            found.add(node)
        elif node.target in _MASK_OPS:
            tensors = [
                source
                for source in node.all_input_nodes
                if isinstance(source.meta.get("val"), torch.Tensor)
            ]
            if tensors and all(source in found for source in tensors):
                found.add(node)
    return found


def forget_new(program: Program, masks: Collection[Node]) -> None:
    """Let nodes that only ask which of the new tokens are real take all of them for real.

    Args:
        program: a step graph, changed.
        masks: its ``mask_nodes``.
    """
    ids = next(node for node in program.placeholders if node.name == "input_ids")
    for mask in [node for node in masks if _is_of_new(node, masks, ids)]:
        for user in list(mask.users):
            same = _unmasked(user, mask)
            if same is not None and dims(same) == dims(user):
                user.replace_all_uses_with(same)
    program.graph.eliminate_dead_code()


def _is_of_new(node: Node, masks: Collection[Node], ids: Node) -> bool:
    """Whether a node is the bool mask [B, S] of the new tokens, cut from that of all."""
    if node.target is not aten.slice.Tensor or node.args[0] not in masks:
        return False
    end = argument(node, "end")
    to_the_end = end is None or cast(int, end) == sys.maxsize
    one_to_one = argument(node, "dim") == 1 and argument(node, "step") == 1
    is_bool = node.meta["val"].dtype == torch.bool
    return to_the_end and one_to_one and is_bool and dims(node) == dims(ids)


def _unmasked(user: Node, mask: Node) -> Node | None:
    """What a node gives where all of the mask is True, None if that is no other node."""
    if user.target is aten.logical_and.default:
        return next((source for source in user.all_input_nodes if source is not mask), None)
    if user.target in (aten.where.ScalarOther, aten.where.self) and user.args[0] is mask:
        return cast(Node, user.args[1])
    return None
