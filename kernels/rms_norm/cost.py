"""Cost of root-mean-square normalisation."""

from __future__ import annotations

import math

from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims, expr


def flops(node: Node) -> Expr:
    """4 per element (square, sum, two products), 3 without a weight."""
    per_element = 3 if argument(node, "weight") is None else 4
    return per_element * math.prod(dims(argument(node, "x")), start=expr(1))
