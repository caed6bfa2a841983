"""Cost of the attention mask."""

from __future__ import annotations

from torch.fx import Node

from fxgraft.kernels.spec import Expr, expr


def flops(node: Node) -> Expr:
    """0: the mask is integer comparisons."""
    return expr(0)
