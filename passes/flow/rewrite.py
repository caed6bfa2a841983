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
from fxgraft.packed_weights import packed_names
from fxgraft.passes.flow.stream import decode
from fxgraft.passes.flow.units import Unit
from fxgraft.program import Program

aten = torch.ops.aten
_nm_linear: Any = torch.ops.fxgraft.nm_linear.default


def rewrite(program: Program, units: Sequence[Unit], tensors: Mapping[str, Tensor]) -> list[str]:
    """Replace the layers that have new weights.

    Products with one matrix, and those of experts, become ``fxgraft::nm_linear`` with packed
    weights. Others keep their op, and a weight with zeros that is declared to follow the pattern.

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
        if unit.form is not None and _bias_fits(unit):
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
    """Whether the bias is one of the op's: one row for all. That of a batch is added behind it."""
    bias = _bias_of(unit.node)
    return bias is None or (isinstance(bias, Node) and len(dims(bias)) == 1)


def _pattern(unit: Unit, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    n, m = (int(size) for size in tensors[f"{unit.weight}.pattern"])
    return n, m


def _pack(program: Program, unit: Unit, tensors: Mapping[str, Tensor]) -> None:
    node, (n, m) = unit.node, _pattern(unit, tensors)
    reads = [
        graphs.insert_weight(program.graph_module, node, program.add_weight(name, value))
        for name, value in zip(
            packed_names(unit.weight), _stored(program, unit, tensors), strict=True
        )
    ]
    x, missing = unit.source, -unit.product.reduction % m
    if missing:
        x = graphs.insert(node, aten.constant_pad_nd.default, (x, [0, missing]))
    sparse = graphs.insert(node, _nm_linear, (x, *reads, *_others(unit)), {"n": n, "m": m})
    if node.target is aten.baddbmm.default:
        sparse = graphs.insert(node, aten.add.Tensor, (node.args[0], sparse))
    node.replace_all_uses_with(sparse)
    node.graph.erase_node(node)


def _stored(program: Program, unit: Unit, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Values and indices as the op takes them; those of experts [E, ...]."""
    old = program.weight(unit.weight)
    values: Tensor = tensors[f"{unit.weight}.values"].to(old.device, old.dtype)
    indices: Tensor = tensors[f"{unit.weight}.indices"].to(old.device)
    if unit.form != "matrix":
        # Encoded are the rows of all experts, one after the other.
        rows = (unit.product.copies, unit.product.outputs)
        values, indices = (
            part.reshape(*part.shape[:2], *rows, *part.shape[3:]).movedim(2, 0).contiguous()
            for part in (values, indices)
        )
    if isinstance(old, nn.Parameter):
        values = nn.Parameter(values, requires_grad=old.requires_grad)
    return values, indices


def _others(unit: Unit) -> list[Any]:
    """The arguments behind the weight: a bias, or where the rows of each expert end."""
    if unit.form == "grouped":
        return [None, None, None, unit.node.args[2]]
    if unit.form == "batched":
        return [None, None, None, _even_ends(unit)]
    bias = _bias_of(unit.node)
    return [] if bias is None else [bias]


def _even_ends(unit: Unit) -> Node:
    """Where the rows of each expert end if x is [E, T, K]: T, 2 T, ..., as nodes."""
    node = unit.node
    one = graphs.insert(node, aten.select.int, (unit.source, 2, 0))
    ones = graphs.insert(node, aten.ones_like.default, (one,), {"dtype": torch.int64})
    counts = graphs.insert(node, aten.sum.dim_IntList, (ones, [1]))
    return graphs.insert(node, aten.cumsum.default, (counts, 0))


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
