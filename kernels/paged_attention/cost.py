"""Cost of paged attention."""

from __future__ import annotations

from typing import Any, cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims


def flops(node: Node) -> Expr:
    """Two products of every query with every key that its table row has room for, and the gate.

    How many tokens a row really has is in ``past``, and which are gated in ``gated``, which the
    graph does not tell: where heads are suppressed, one token per row is taken to be gated.
    """
    batch, heads, length, head_dim = dims(argument(node, "query"))
    value_dim = dims(argument(node, "value"))[3]
    keys = dims(argument(node, "table"))[1] * dims(argument(node, "key_cache"))[2]
    window = argument(node, "window")
    if isinstance(window, int):
        keys = cast(Expr, sympy.Min(keys, window))
    of_head = 2 * keys * (head_dim + value_dim)
    total = batch * heads * length * of_head
    if argument(node, "gated") is None:
        return total
    return total + batch * (_gate(node) - _skipped_heads(node) * of_head)


def _gate(node: Node) -> Expr:
    """Score, rank and scale the heads of one token."""
    heads, head_dim = dims(argument(node, "query"))[1::2]
    value_dim = dims(argument(node, "value"))[3]
    by_shares = argument(node, "key_sum_cache") is None
    # Shares are sums of weights that attention computes anyway; their additions are left out.
    score = sympy.Integer(0) if by_shares else 2 * heads * head_dim
    return score + heads * (heads + value_dim)


def _skipped_heads(node: Node) -> Expr:
    """Query heads that one token leaves out: those of kv heads of which none stays.

    The ``keep`` heads that stay may be of as many kv heads, if there are as many.
    """
    if argument(node, "factor") or argument(node, "key_sum_cache") is None:
        return sympy.Integer(0)
    heads, kv_heads = dims(argument(node, "query"))[1], dims(argument(node, "key"))[1]
    keep = cast(int, argument(node, "keep"))
    skipped = cast(Expr, sympy.Max(kv_heads - keep, 0)) * heads / kv_heads
    is_step = cast(Any, sympy.Eq)(dims(argument(node, "query"))[2], 1)
    return cast(Expr, sympy.Piecewise((skipped, is_step), (0, True)))
