"""Cost of ``attention_mass``."""

from __future__ import annotations

from typing import cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims


def flops(node: Node) -> Expr:
    """2 · B · Hq · S · T · D, with T no more than the window; the softmax is left out."""
    batch, heads, length, head_dim = dims(argument(node, "query"))
    total = dims(argument(node, "key"))[2]
    window = argument(node, "window")
    keys = total if window is None else cast(Expr, sympy.Min(total, window))
    return 2 * batch * heads * length * keys * head_dim
