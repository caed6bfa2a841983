"""Cost of attention."""

from __future__ import annotations

from typing import cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims


def flops(node: Node) -> Expr:
    """2 · B · Hq · S · T · (D + Dv), with T no more than the window.

    A causal mask is not taken off: on a step of one token there is nothing to take off, and at
    prefill a library may or may not skip the upper triangle. Softmax is left out.
    """
    batch, heads, length, head_dim = dims(argument(node, "query"))
    *_, total, value_dim = dims(argument(node, "value"))
    window = argument(node, "window")
    keys = total if window is None else cast(Expr, sympy.Min(total, window))
    return 2 * batch * heads * length * keys * (head_dim + value_dim)
