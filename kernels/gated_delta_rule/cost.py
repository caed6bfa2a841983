"""Work of one ``gated_delta_rule`` node."""

from __future__ import annotations

from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims, expr

_PER_STATE = 7  # decay 1; answer, update and read 2 each


def flops(node: Node) -> Expr:
    """The recurrence for each token and head, plus decay, scale and normalisation."""
    batch, length, heads, value_dim = dims(argument(node, "value"))
    key_heads, key_dim = dims(argument(node, "key"))[2:]
    gates = dims(argument(node, "gate"))[3:] or (expr(1),)
    per_head = _PER_STATE * key_dim * value_dim + 2 * value_dim + gates[0]
    per_key_head = key_dim
    if argument(node, "l2norm"):
        per_key_head += 2 * (3 * key_dim + 2)
    return batch * length * (heads * per_head + key_heads * per_key_head)
