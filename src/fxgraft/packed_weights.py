"""Weights packed as N:M sparse ones, in ``fxgraft::nm_linear``, and dense again.

A pass that cuts weights unpacks them, works on plain linear layers, and packs what still obeys.
``<layer>.weight`` becomes ``<layer>.values`` and ``<layer>.indices``; the weights of experts, a
stack ``<name>`` [E, out, in], become ``<name>_values`` and ``<name>_indices``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.kernels.nm_linear.layout import Layout
from fxgraft.kernels.nm_linear.packing import pack, unpack
from fxgraft.kernels.spec import argument
from fxgraft.program import Program

aten = torch.ops.aten
_GROUPED = ("aten._grouped_mm", "transformers.grouped_mm_fallback")
_linear: Any = aten.linear.default
_nm_linear: Any = torch.ops.fxgraft.nm_linear.default
Pattern = tuple[int, int]


def packed_names(weight: str) -> tuple[str, str]:
    """The names of values and indices for a dense weight's name."""
    base = weight.removesuffix("weight") if weight.endswith(".weight") else f"{weight}_"
    base = "" if weight == "weight" else base
    return f"{base}values", f"{base}indices"


def unpack_weights(program: Program) -> dict[str, Pattern]:
    """Make every ``nm_linear`` a product with a dense weight; the Program is changed.

    Returns:
        N and M by name of the dense weight, for ``pack_weights``.
    """
    patterns: dict[str, Pattern] = {}
    for node in program.graph.find_nodes(op="call_function", target=_nm_linear):
        n, m = cast(Pattern, (argument(node, "n"), argument(node, "m")))
        stored = [program.weight(str(part.target)) for part in cast("list[Node]", node.args[1:3])]
        name = _dense_name(str(cast(Node, node.args[1]).target))
        if name not in patterns:
            dense = unpack(stored[0].detach(), stored[1], n, m)
            graphs.set_weight(program.graph_module, name, _like(stored[0], dense))
        patterns[name] = (n, m)
        _use_dense(node, graphs.insert_weight(program.graph_module, node, name))
    if patterns:
        graphs.finish(program.graph_module)
    return patterns


def grouped_product() -> Any:
    """The op of captured experts: (x [T, in], weights [E, in, out], ends [E]) → [T, out]."""
    importlib.import_module("transformers.integrations.moe")
    return torch.ops.transformers.grouped_mm_fallback.default


def _use_dense(node: Node, weight: Node) -> None:
    x, bias, ends = cast(Node, node.args[0]), argument(node, "bias"), argument(node, "ends")
    if ends is None:
        _replace(node, _linear, (x, weight, bias))
        return
    grouped, shape = grouped_product(), node.meta["val"].shape
    turned = graphs.insert(node, aten.transpose.int, (weight, -2, -1))
    if len(shape) == 2:
        _replace(node, grouped, (x, turned, ends))
        return
    rows = graphs.insert(node, aten.flatten.using_ints, (x, 0, -2))
    product = graphs.insert(node, grouped, (rows, turned, ends))
    _replace(node, aten.unflatten.int, (product, 0, [*shape[:-2], -1]))


def pack_weights(program: Program, patterns: Mapping[str, Pattern]) -> list[str]:
    """Make products with some weights ``nm_linear``; the Program is changed.

    Args:
        program: its weights of these names keep what is not 0.
        patterns: N and M by name of the weight.

    Returns:
        Names of the weights that stay dense: a group has more than N weights, M does not divide
        the columns, or something else than linear layers or grouped products reads them.
    """
    readers: dict[str, list[Node]] = {name: [] for name in patterns}
    for read in program.graph.find_nodes(op="get_attr"):
        if read.target in readers:
            readers[str(read.target)] += [_past_transpose(user) for user in read.users]
    left: list[str] = []
    for name, (n, m) in patterns.items():
        if not readers[name]:
            continue
        packed = _packed(program.weight(name), n, m)
        if packed is None or not all(_multiplies(node, name) for node in readers[name]):
            left.append(name)
            continue
        for node in readers[name]:
            _use(program, node, name, packed, (n, m))
    graphs.finish(program.graph_module)
    return left


def _past_transpose(reader: Node) -> Node:
    """A reader of a weight, or of a stack's transpose the product that reads it."""
    if reader.target is not aten.transpose.int or len(reader.users) != 1:
        return reader
    places = {cast(int, place) % 3 for place in reader.args[1:3]}
    is_stack = reader.meta["val"].dim() == 3 and places == {1, 2}
    return next(iter(reader.users)) if is_stack else reader


def _packed(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor] | None:
    """Values and indices, or None if the weight does not obey."""
    if weight.dim() not in (2, 3) or weight.shape[-1] % m or weight.numel() == 0:
        return None
    rows, layout = weight.shape[-2], Layout(n, m, weight.shape[-1] // m)
    if weight.is_meta:
        stack = weight.shape[:-2]
        values = weight.new_empty(*stack, *layout.values_shape(rows))
        indices = values.new_empty(*stack, *layout.indices_shape(rows), dtype=layout.word_dtype)
        return _like(weight, values), indices
    mask = weight.detach() != 0
    if bool((mask.view(-1, layout.groups, m).sum(-1) > n).any()):
        return None
    values, indices = pack(weight, mask, n, m)
    return _like(weight, values), indices


def _multiplies(node: Node, name: str) -> bool:
    """Whether a node is a product of x with a weight [out, in], or with a stack's transpose."""
    if node.target is _linear:
        weight = node.args[1]
    elif graphs.short_target(node) in _GROUPED and len(node.args) == 3 and not node.kwargs:
        turned = cast(Node, node.args[1])
        weight = turned.args[0] if turned.target is aten.transpose.int else None
    else:
        return False
    return isinstance(weight, Node) and weight.target == name


def _use(
    program: Program, node: Node, name: str, packed: tuple[Tensor, Tensor], pattern: Pattern
) -> None:
    names = packed_names(name)
    for each, tensor in zip(names, packed, strict=True):
        graphs.set_weight(program.graph_module, each, tensor)
    reads = [graphs.insert_weight(program.graph_module, node, each) for each in names]
    is_stack = node.target is not _linear
    others = (None, None, None, node.args[2]) if is_stack else (argument(node, "bias"),)
    args = (node.args[0], *reads, *others)
    _replace(node, _nm_linear, args, {"n": pattern[0], "m": pattern[1]})


def _dense_name(values: str) -> str:
    """The inverse of ``packed_names``."""
    base = values.removesuffix("values")
    if base == values:
        return f"{values}_dense"
    return base.removesuffix("_") if base.endswith("_") else f"{base}weight"


def _like(old: Tensor, new: Tensor) -> Tensor:
    """A parameter if the old tensor is one."""
    if not isinstance(old, nn.Parameter):
        return new
    return nn.Parameter(new, requires_grad=old.requires_grad)


def _replace(
    node: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> None:
    new = graphs.insert(node, target, args[:-1] if args[-1] is None else args, kwargs)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
