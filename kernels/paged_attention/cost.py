"""Cost of paged attention."""

from __future__ import annotations

from typing import cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims


def flops(node: Node) -> Expr:
    """Two products of every query with every key that its table row has room for.

    How many tokens a row really has is in ``past``, which the graph does not tell.
    """
    batch, heads, length, head_dim = dims(argument(node, "query"))
    value_dim = dims(argument(node, "value"))[3]
    keys = dims(argument(node, "table"))[1] * dims(argument(node, "key_cache"))[2]
    window = argument(node, "window")
    if isinstance(window, int):
        keys = cast(Expr, sympy.Min(keys, window))
    return 2 * batch * heads * length * keys * (head_dim + value_dim)
