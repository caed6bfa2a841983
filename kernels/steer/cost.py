"""Cost of steering."""

from __future__ import annotations

import math

from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims, expr


def flops(node: Node) -> Expr:
    """One sum per element of x; scaling the vector is left out."""
    return math.prod(dims(argument(node, "x")), start=expr(1))
