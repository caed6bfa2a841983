"""Cost of a linear layer with an N:M sparse weight."""

from __future__ import annotations

import math
from typing import Any, cast

import sympy
from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument, dims, expr


def pattern(node: Node) -> tuple[int, int]:
    """N and M of a node that calls ``fxgraft::nm_linear``."""
    return cast(int, argument(node, "n")), cast(int, argument(node, "m"))


def features(node: Node) -> tuple[Expr, Expr]:
    """Outputs and inputs (N and K of the dense weight, of one expert's) of such a node."""
    chunks, _, rows, lane = dims(argument(node, "values"))[-4:]
    return rows, chunks * lane * pattern(node)[1]


def experts(node: Node) -> int | None:
    """Number of weights among which rows are divided; None for a single one."""
    if argument(node, "ends") is None:
        return None
    return int(cast(Any, dims(argument(node, "values"))[0]))


def flops(node: Node) -> Expr:
    """2 per kept weight and row, 2 · rows · outputs · inputs · N / M, and what follows per output.

    That is 1 for a bias and for a residual, and 2 for gate and activation; a norm takes 3 per
    input, 4 with a weight.
    """
    n, m = pattern(node)
    outputs, inputs = features(node)
    rows = math.prod(dims(argument(node, "x"))[:-1], start=expr(1))
    total = 2 * rows * outputs * inputs * sympy.Rational(n, m)
    if argument(node, "eps") is not None:
        total += (3 if argument(node, "norm_weight") is None else 4) * rows * inputs
    gated = argument(node, "activation") is not None
    width = outputs / 2 if gated else outputs
    if argument(node, "bias") is not None:
        total += rows * outputs
    if gated:
        total += 2 * rows * width
    return total if argument(node, "residual") is None else total + rows * width
