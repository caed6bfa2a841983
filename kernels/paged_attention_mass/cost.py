"""Cost of ``paged_attention_mass``."""

from __future__ import annotations

from typing import cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims


def flops(node: Node) -> Expr:
    """A product of every query with every key that its table row has room for."""
    batch, heads, length, head_dim = dims(argument(node, "query"))
    keys = dims(argument(node, "table"))[1] * dims(argument(node, "key_cache"))[2]
    window = argument(node, "window")
    if isinstance(window, int):
        keys = cast(Expr, sympy.Min(keys, window))
    return 2 * batch * heads * length * keys * head_dim
