"""Weights packed as N:M sparse ones, in ``fxgraft::nm_linear``, and dense again.

A pass that cuts weights unpacks them, works on plain linear layers, and packs what still obeys.
``<layer>.weight`` becomes ``<layer>.values`` and ``<layer>.indices``.
"""

from __future__ import annotations

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

_linear: Any = torch.ops.aten.linear.default
_nm_linear: Any = torch.ops.fxgraft.nm_linear.default
Pattern = tuple[int, int]


def unpack_weights(program: Program) -> dict[str, Pattern]:
    """Make every ``nm_linear`` a linear layer with a dense weight; the Program is changed.

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
        read = graphs.insert_weight(program.graph_module, node, name)
        _replace(node, _linear, (node.args[0], read, argument(node, "bias")))
    if patterns:
        graphs.finish(program.graph_module)
    return patterns


def pack_weights(program: Program, patterns: Mapping[str, Pattern]) -> list[str]:
    """Make linear layers on some weights ``nm_linear``; the Program is changed.

    Args:
        program: its weights of these names keep what is not 0.
        patterns: N and M by name of the weight.

    Returns:
        Names of the weights that stay dense: a group has more than N weights, M does not divide
        the columns, or something else than linear layers reads them.
    """
    readers: dict[str, list[Node]] = {name: [] for name in patterns}
    for read in program.graph.find_nodes(op="get_attr"):
        if read.target in readers:
            readers[str(read.target)] += list(read.users)
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


def _packed(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor] | None:
    """Values and indices, or None if the weight does not obey."""
    if weight.dim() != 2 or weight.shape[1] % m or weight.shape[1] == 0:
        return None
    rows, layout = weight.shape[0], Layout(n, m, weight.shape[1] // m)
    if weight.is_meta:
        values = weight.new_empty(layout.values_shape(rows))
        indices = values.new_empty(layout.indices_shape(rows), dtype=layout.word_dtype)
        return _like(weight, values), indices
    mask = weight.detach() != 0
    if bool((mask.view(rows, layout.groups, m).sum(-1) > n).any()):
        return None
    values, indices = pack(weight, mask, n, m)
    return _like(weight, values), indices


def _multiplies(node: Node, name: str) -> bool:
    weight = node.args[1] if node.target is _linear else None
    return isinstance(weight, Node) and weight.target == name


def _use(
    program: Program, node: Node, name: str, packed: tuple[Tensor, Tensor], pattern: Pattern
) -> None:
    base = name.removesuffix("weight")
    names = [
        f"{base}{leaf}" if base != name else f"{name}_{leaf}" for leaf in ("values", "indices")
    ]
    for each, tensor in zip(names, packed, strict=True):
        graphs.set_weight(program.graph_module, each, tensor)
    reads = [graphs.insert_weight(program.graph_module, node, each) for each in names]
    args = (node.args[0], *reads, argument(node, "bias"))
    _replace(node, _nm_linear, args, {"n": pattern[0], "m": pattern[1]})


def _dense_name(values: str) -> str:
    base = values.removesuffix("values")
    return f"{base}weight" if base != values and base[-1:] in (".", "") else f"{values}_dense"


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
