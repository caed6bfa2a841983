"""Cost of ``head_gate``."""

from __future__ import annotations

from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims


def flops(node: Node) -> Expr:
    """B · H · S · (H + D): a comparison per pair of heads and a product per element."""
    batch, heads, length, head_dim = dims(argument(node, "x"))
    return batch * heads * length * (heads + head_dim)
