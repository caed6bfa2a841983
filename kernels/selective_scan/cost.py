"""Work of one ``selective_scan`` node."""

from __future__ import annotations

from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims

_PER_STATE = 7  # decay: product and exponential; input: product; update and read: 2 each
_SOFTPLUS_FLOPS = 3
_GATE_FLOPS = 5


def flops(node: Node) -> Expr:
    """The recurrence for each token, channel and state, plus skip, gate and time step."""
    batch, channels, length = dims(argument(node, "x"))
    states = dims(argument(node, "A"))[1]
    per_channel = _PER_STATE * states + 1
    per_channel += 2 * (argument(node, "D") is not None)
    per_channel += _GATE_FLOPS * (argument(node, "z") is not None)
    per_channel += 1 * (argument(node, "dt_bias") is not None)
    per_channel += _SOFTPLUS_FLOPS * bool(argument(node, "softplus"))
    return batch * channels * length * per_channel
