"""Work of one ``linear_recurrence`` node."""

from __future__ import annotations

from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims


def flops(node: Node) -> Expr:
    """One multiply-add for each token and channel."""
    batch, length, channels = dims(argument(node, "x"))
    return 2 * batch * length * channels
