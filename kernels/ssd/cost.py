"""Work of one ``ssd`` node."""

from __future__ import annotations

from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims

_PER_STATE = 5  # decay 1, update 2, read 2
_SOFTPLUS_FLOPS = 3
_GATE_FLOPS = 5


def flops(node: Node) -> Expr:
    """The recurrence for each token and head, plus skip, gate and time step."""
    batch, length, heads, head_dim = dims(argument(node, "x"))
    states = dims(argument(node, "B"))[3]
    per_channel = _PER_STATE * states + 1
    per_channel += 2 * (argument(node, "D") is not None)
    per_channel += _GATE_FLOPS * (argument(node, "z") is not None)
    per_head = 2 + (argument(node, "dt_bias") is not None)
    per_head += _SOFTPLUS_FLOPS * bool(argument(node, "softplus"))
    return batch * length * heads * (head_dim * per_channel + per_head)
