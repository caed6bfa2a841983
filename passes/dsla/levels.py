"""A Program with live layers at one level: a Program like any other, for costs and comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.cost import CostTable
from fxgraft.errors import InputError
from fxgraft.passes.dsla.fold import choices_of
from fxgraft.program import Program


def at_level(program: Program, level: int) -> Program:
    """A copy in which the first ``level`` live layers are linear and the others softmax.

    Level 0 is the Program from before pass ``dsla``: the same nodes and the same weights.

    Args:
        program: with pass ``dsla`` and ``live``.
        level: from 0 to the number of live layers.

    Raises:
        InputError: there is no such level.
    """
    order = list(choices_of(program))
    if not 0 <= level <= len(order):
        raise InputError(
            f"the Program has no level {level}",
            f"it has {len(order)} live layers, so give 0 to {len(order)}",
        )
    copy = program.copy()
    linear = set(order[:level])
    for node in [n for n in copy.placeholders if n.name in order]:
        for user in list(node.users):
            options = cast("Sequence[Node]", user.args[1])
            user.replace_all_uses_with(options[node.name in linear])
            copy.graph.erase_node(user)
        copy.graph.erase_node(node)
    copy.inputs = tuple(spec for spec in copy.inputs if spec.name not in order)
    graphs.finish(copy.graph_module)
    return copy


def costs(program: Program) -> dict[int, CostTable]:
    """Cost of a Program with live layers at each level; simulators choose between them."""
    levels = range(len(choices_of(program)) + 1)
    return {level: at_level(program, level).cost() for level in levels}


def state_bytes(program: Program) -> int:
    """Bytes of linear attention's states per sequence."""
    nodes = program.graph.find_nodes(
        op="call_function", target=torch.ops.fxgraft.linear_attention.default
    )
    values = [cast("tuple[torch.Tensor, torch.Tensor]", node.meta["val"])[1] for node in nodes]
    return sum(
        value.dtype.itemsize * int(torch.Size(int(size) for size in value.shape[1:]).numel())
        for value in values
    )
