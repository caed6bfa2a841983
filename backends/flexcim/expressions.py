"""Cycles of every node as expressions over batch, new tokens and past, with their ceilings."""

from __future__ import annotations

from typing import Any

import sympy as untyped_sympy  # pyright: ignore[reportMissingTypeStubs]

from fxgraft.backends.flexcim.mapper import layouts
from fxgraft.backends.flexcim.model import CostModel
from fxgraft.errors import InputError
from fxgraft.step_costs import StepNode

sympy: Any = untyped_sympy


def cycles(model: CostModel) -> dict[str, Any]:
    """Cycles by name of node; sympy expressions over the step graph's dimensions.

    Evaluated at sizes they equal ``model.costs(...)``. Their sum is the model's latency.

    Args:
        model: whose mapper minimises latency, so that its choice is the least of all layouts.

    Raises:
        InputError: the objective is another one, or the model has experts, whose number of rows
            has no closed form here.
    """
    if model.objective != "latency":
        raise InputError(
            f"the mapper's objective is {model.objective!r}", "lower with objective 'latency'"
        )
    found: dict[str, Any] = {}
    for place, node in enumerate(model.graph.nodes):
        is_mapped = place in model.linears
        expression = _linear(model, place, node) if is_mapped else _vector(model, node)
        found[node.row.name] = expression
    return found


def _linear(model: CostModel, place: int, node: StepNode) -> Any:
    linear, rows = model.linears[place], model.graph.rows_of(node)
    if linear.copies > 1:
        raise InputError(
            f"node {node.row.name!r} has {linear.copies} experts", "evaluate costs at numbers"
        )
    found = layouts(model.hardware, linear.gemm, streamed=model.streamed)
    least = sympy.Min(*(layout.cycles(rows) for layout in found))
    product = 2 * rows * linear.gemm.reduction * linear.gemm.outputs
    beside = sympy.expand(node.row.cost.flops - product)
    return least + sympy.ceiling(beside / sympy.Rational(model.hardware.vector_operations))


def _vector(model: CostModel, node: StepNode) -> Any:
    cost, hardware = node.row.cost, model.hardware
    flops: Any = cost.flops
    if node.is_triangular:
        new, past = (sympy.Symbol(n, integer=True, nonnegative=True) for n in ("sequence", "past"))
        past = past if model.graph.states else 0
        flops = flops * (past + (new + 1) / 2) / (past + new)
    moved: Any = cost.bytes_read + cost.bytes_written
    return sympy.Max(
        sympy.ceiling(flops / sympy.Rational(hardware.vector_operations)),
        sympy.ceiling(moved / sympy.Rational(hardware.vector_bytes)),
    )
