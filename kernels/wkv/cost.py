"""Work of one ``wkv`` node."""

from __future__ import annotations

from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims

_PER_CHANNEL = 22  # two pairs of stable weights (6 each), two weighted sums (5 each)


def flops(node: Node) -> Expr:
    """The recurrence for each token and channel, plus one division."""
    batch, length, channels = dims(argument(node, "key"))
    return batch * length * channels * (_PER_CHANNEL + 1)
