"""Putting pruned weights into a Program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft import sparsity
from fxgraft.kernels.spec import argument, dims
from fxgraft.passes.flow.stream import decode
from fxgraft.passes.flow.units import Unit
from fxgraft.program import Program

aten = torch.ops.aten


def rewrite(program: Program, units: Sequence[Unit], tensors: Mapping[str, Tensor]) -> list[str]:
    """Replace the layers that have new weights.

    One matrix becomes ``fxgraft::nm_linear`` with packed weights. Experts and other products keep
    their op, and a weight with zeros that is declared to follow the pattern.

    Args:
        program: to change.
        units: its prunable layers.
        tensors: the encoded layers.

    Returns:
        The names of the weights that stay dense tensors with zeros.
    """
    zeroed: list[str] = []
    for unit in units:
        if f"{unit.weight}.values" not in tensors:
            continue
        if unit.is_packable and _bias_fits(unit):
            _pack(program, unit, tensors)
        else:
            _zero(program, unit, tensors)
            zeroed.append(unit.weight)
    return zeroed


def _bias_of(node: Node) -> Any:
    if node.target is aten.addmm.default:
        return node.args[0]
    return argument(node, "bias") if node.target is aten.linear.default else None


def _bias_fits(unit: Unit) -> bool:
    bias = _bias_of(unit.node)
    return bias is None or (isinstance(bias, Node) and len(dims(bias)) == 1)


def _pattern(unit: Unit, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    n, m = (int(size) for size in tensors[f"{unit.weight}.pattern"])
    return n, m


def _pack(program: Program, unit: Unit, tensors: Mapping[str, Tensor]) -> None:
    node, (n, m) = unit.node, _pattern(unit, tensors)
    old = program.weight(unit.weight)
    values: Tensor = tensors[f"{unit.weight}.values"].to(old.device, old.dtype)
    if isinstance(old, nn.Parameter):
        values = nn.Parameter(values, requires_grad=old.requires_grad)
    stem = unit.weight.removesuffix(".weight")
    reads = [
        graphs.insert_weight(program.graph_module, node, program.add_weight(name, value))
        for name, value in (
            (f"{stem}.values", values),
            (f"{stem}.indices", tensors[f"{unit.weight}.indices"].to(old.device)),
        )
    ]
    x, missing = unit.source, -unit.product.reduction % m
    if missing:
        x = graphs.insert(node, aten.constant_pad_nd.default, (x, [0, missing]))
    bias = [_bias_of(node)] if _bias_of(node) is not None else []
    sparse = graphs.insert(
        node, torch.ops.fxgraft.nm_linear.default, (x, *reads, *bias), {"n": n, "m": m}
    )
    node.replace_all_uses_with(sparse)
    node.graph.erase_node(node)


def _zero(program: Program, unit: Unit, tensors: Mapping[str, Tensor]) -> None:
    n, m = _pattern(unit, tensors)
    old = program.weight(unit.weight)
    matrices = decode(unit, tensors)
    assert matrices is not None
    new = unit.write(old, matrices.to(old.device))
    is_parameter = isinstance(old, nn.Parameter)
    kept = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
    program.set_weight(unit.weight, kept)
    pattern = sparsity.DeclaredPattern(n, m, bool(unit.product.reduction % m))
    sparsity.declare(program, unit.weight, pattern)
