"""Work of one ``linear_attention`` node."""

from __future__ import annotations

from typing import Any, cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims

Size = Expr | int

_GATE_FLOPS = 5  # logsigmoid 3, division, exponential
_WRITE_FLOPS = 5  # √(1 - g²) 4, product with the key
_NORM_FLOPS = 4


def flops(node: Node) -> Expr:
    """The recurrence for each token: 3 per cell to decay and write, 2 per query head to read."""
    batch, length, query_heads, key_dim = dims(argument(node, "query"))
    value_dim = dims(argument(node, "value"))[3]
    gate = dims(argument(node, "gate"))
    heads = query_heads if gate[2] == query_heads else dims(argument(node, "key"))[2]
    channels = gate[3] * key_dim
    cells = channels * value_dim
    per_token = 3 * heads * cells + query_heads * (2 * cells + 2 * channels)
    per_token += _GATE_FLOPS * gate[2] * gate[3] * gate[4]
    per_token += _WRITE_FLOPS * heads * channels * (argument(node, "write_scale") == "sqrt")
    normed = argument(node, "norm_weight") is not None
    per_token += _NORM_FLOPS * query_heads * value_dim * normed
    return batch * length * per_token


def state_traffic(states: Size, heads: Size, key_dim: Size, value_dim: Size, item: Size) -> Expr:
    """Bytes of state that one token of one sequence reads and writes.

    Args:
        states, heads, key_dim, value_dim: N, Hs, Dk and Dv.
        item: bytes of an element of the state.
    """
    return _expression(2 * states * heads * key_dim * value_dim * item)


def break_even(
    traffic: Expr, gate_bytes: Size, batch: Size, kv_heads: Size, head_dim: Size, item: Size
) -> Expr:
    """Context length from which a decode step moves fewer bytes than softmax attention's.

    Source: DSLA specification, section 8.2. Softmax attention reads keys and values of the whole
    context; linear attention moves its states, and for all sequences together the weights that
    only gates need.

    Args:
        traffic: of the states of one sequence, see ``state_traffic``.
        gate_bytes: of the weights that make the gates.
        batch: sequences in a step.
        kv_heads, head_dim, item: of keys and values, and bytes of an element.
    """
    return (traffic + _expression(gate_bytes) / batch) / (2 * kv_heads * head_dim * item)


def _expression(size: Size) -> Expr:
    return cast(Any, sympy).sympify(size)
