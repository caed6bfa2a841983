"""A step graph in which some dimensions are fixed numbers, such as one new token per row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from fxgraft import graph as graphs
from fxgraft.kernels.spec import expr
from fxgraft.program import Program
from fxgraft.state import StepProgram, step_inputs


def specialise(step: StepProgram, sizes: Mapping[str, int]) -> Program:
    """A copy of a step graph in which some dimensions are fixed numbers.

    Args:
        step: the step graph; it is not changed.
        sizes: the dimensions to fix, for example ``{"sequence": 1}``.
    """
    program = step.program.copy()
    inputs = tuple(
        replace(
            spec,
            shape=tuple(
                sizes.get(size, size) if isinstance(size, str) else size for size in spec.shape
            ),
        )
        for spec in program.inputs
    )
    dimensions = {name: r for name, r in program.dimensions.items() if name not in sizes}
    values = step_inputs(inputs, dimensions, program.device, sizes)
    for node, value in zip(program.placeholders, values, strict=True):
        node.meta["val"] = value
    graphs.propagate(program.graph_module)
    for node in program.graph.nodes:
        _use_constant(node)
    graphs.finish(program.graph_module)
    return replace(program, inputs=inputs, dimensions=dimensions)


def _use_constant(node: Node) -> None:
    """Replace reads of a size that has become a number by the number."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt) and expr(value).is_Integer:
        value = int(value)
    if not isinstance(value, int) or node.op == "placeholder":
        return
    number = value
    for user in list(node.users):
        user.args = map_arg(user.args, lambda n: number if n is node else n)
        user.kwargs = map_arg(user.kwargs, lambda n: number if n is node else n)
