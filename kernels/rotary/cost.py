"""Cost of rotary position embedding."""

from __future__ import annotations

from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims


def flops(node: Node) -> Expr:
    """3 per rotated channel: two products and a sum."""
    batch, heads, length, _ = dims(argument(node, "x"))
    width = dims(argument(node, "cos"))[-1]
    return 3 * batch * heads * length * width
