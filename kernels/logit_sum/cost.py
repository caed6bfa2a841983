"""Cost of ``logit_sum``."""

from __future__ import annotations

from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims


def flops(node: Node) -> Expr:
    """2 · B · Hq · S · D for the products, and B · Hkv · S · D for the running sum."""
    batch, heads, length, head_dim = dims(argument(node, "query"))
    kv_heads = dims(argument(node, "key"))[1]
    return batch * length * head_dim * (2 * heads + kv_heads)
