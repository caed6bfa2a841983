"""Cost of gated activation."""

from __future__ import annotations

import math

from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims, expr


def flops(node: Node) -> Expr:
    """2 per element: the activation, counted as one operation, and the product."""
    return 2 * math.prod(dims(argument(node, "gate")), start=expr(1))
