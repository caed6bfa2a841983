"""Cost of a fused linear layer."""

from __future__ import annotations

import math

from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims, expr


def flops(node: Node) -> Expr:
    """2 per weight and row, and what bias, norm, gate and residual add per element."""
    shape = dims(argument(node, "x"))
    features, inner = dims(argument(node, "weight"))
    rows = math.prod(shape[:-1], start=expr(1))
    total = 2 * rows * inner * features
    if argument(node, "eps") is not None:
        total += (3 if argument(node, "norm_weight") is None else 4) * rows * inner
    if argument(node, "bias") is not None:
        total += rows * features
    gated = argument(node, "activation") is not None
    width = features / 2 if gated else features
    if gated:
        total += 2 * rows * width
    return total if argument(node, "residual") is None else total + rows * width
