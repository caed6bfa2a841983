"""The linear layers that may be pruned, and how their weights are read and written.

Pruned are products of a value with one weight inside a block. Left alone, and named in the report:

1. routers: what chooses experts (its output reaches a top-k), and gates with one output;
2. projections that feed the small arguments of a recurrence (Mamba's ``x_proj`` and ``dt_proj``,
   decays, gates): ``include`` brings them back;
3. products whose weight is computed from others.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft.errors import InputError
from fxgraft.kernels.spec import dims, expr, spec_of
from fxgraft.layers import Layer, is_linear
from fxgraft.operators import aliases_input, qualified_name
from fxgraft.passes.flow.patterns import WIDTHS, Pattern
from fxgraft.program import Program
from fxgraft.weight_products import WeightProduct, weight_products

aten = torch.ops.aten
_CHOICES = frozenset({"aten::topk", "aten::argmax", "aten::max", "aten::sort"})
_MAIN_ROLES = frozenset({"input", "query", "key", "value", "key_value", "qkv", "output"})
Form = Literal["matrix", "grouped", "batched"]
"""A product with one matrix; of rows sorted by expert; of the same number of rows per expert."""

_ONE_MATRIX = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)

_BATCHED = (aten.bmm.default, aten.baddbmm.default, aten.matmul.default)


@dataclass(frozen=True, eq=False)
class Unit:
    """One linear layer, or the experts of one product.

    Attributes:
        product: the node and its weight.
        weight: name of the weight.
        layer: index of the block.
        role: last part of the module path, for people.
        is_left_dense: named by ``keep_dense``.
    """

    product: WeightProduct
    weight: str
    layer: int
    role: str
    is_left_dense: bool

    @property
    def node(self) -> Node:
        """The product."""
        return self.product.node

    @property
    def source(self) -> Node:
        """The node of x."""
        return input_of(self.product)

    @property
    def parameters(self) -> int:
        """Weights, those of missing columns not counted."""
        return self.product.copies * self.product.outputs * self.product.reduction

    def pruned(self, pattern: Pattern) -> int:
        """How many weights a pattern prunes; columns that padding adds are not among them."""
        whole, rest = divmod(self.product.reduction, pattern.m)
        kept = whole * pattern.n + min(rest, pattern.n)
        return self.product.copies * self.product.outputs * (self.product.reduction - kept)

    @property
    def form(self) -> Form | None:
        """How ``fxgraft::nm_linear`` can take the place of the product; None if it cannot."""
        node, inputs = self.node, self.node.all_input_nodes
        if node.kwargs or self.source is not inputs[_place_of_x(node)]:
            return None
        if self.product.is_grouped:
            return "grouped" if len(node.args) == 3 else None
        if self.product.copies == 1:
            return "matrix" if node.target in _ONE_MATRIX else None
        shape = dims(self.source)
        is_stack = len(shape) == 3 and shape[:1] == (expr(self.product.copies),)
        return "batched" if node.target in _BATCHED and is_stack else None

    def read(self, weight: Tensor) -> Tensor:
        """The matrices [copies, O, K] in a weight as it is stored."""
        shape = (self.product.copies, self.product.outputs, self.product.reduction)
        moved = _move(self.product.operand, weight.detach())
        return (moved.transpose(-1, -2) if self.product.is_transposed else moved).reshape(shape)

    def write(self, weight: Tensor, matrices: Tensor) -> Tensor:
        """A weight as it is stored, with other matrices [copies, O, K]."""
        if _is_same_memory(self.read(weight), weight):
            return matrices.reshape(weight.shape).to(weight.dtype)
        places = torch.arange(weight.numel(), device=weight.device).reshape(weight.shape)
        flat = torch.empty_like(weight.detach(), memory_format=torch.contiguous_format).flatten()
        flat[self.read(places).flatten()] = matrices.flatten().to(weight.dtype)
        return flat.reshape(weight.shape)


@dataclass(frozen=True)
class Found:
    """What can be pruned.

    Attributes:
        units: in graph order.
        left: why other products inside blocks are left alone, by module path.
    """

    units: tuple[Unit, ...]
    left: dict[str, str]


def find(program: Program, keep_dense: Sequence[str] = (), include: Sequence[str] = ()) -> Found:
    """The prunable layers of a Program.

    Args:
        program: captured.
        keep_dense: patterns of module paths (``"*.layers.0.*"``, ``"*down_proj"``), or indices of
            blocks, that stay dense.
        include: patterns of module paths that are pruned although they would be left alone.

    Raises:
        InputError: a pattern matches nothing, a weight is quantised, or two products share one.
    """
    blocks = {node: layer for layer in program.layers for node in layer.nodes}
    units: list[Unit] = []
    left: dict[str, str] = {}
    for node, product in weight_products(program).items():
        if node not in blocks:
            continue
        path = path_of(product)
        reason = _reason_to_leave(product, blocks[node])
        if reason and not _matches(path, blocks[node].index, include):
            left[path] = reason
            continue
        is_dense = _matches(path, blocks[node].index, keep_dense)
        role = path.rsplit(".", 1)[-1]
        units.append(Unit(product, product.weights[0], blocks[node].index, role, is_dense))
    _check_patterns(units, left, keep_dense, "keep_dense")
    _check_patterns(units, left, include, "include")
    _check_weights(program, units)
    return Found(tuple(units), left)


def path_of(product: WeightProduct) -> str:
    """The name of a product for people and patterns: its weight's, without ``.weight``."""
    return product.weights[0].removesuffix(".weight")


def input_of(product: WeightProduct) -> Node:
    """The node of x in a product."""
    operand, node = product.operand, product.node
    names = [source for source in node.all_input_nodes if source is not operand]
    if node.target is aten.addmm.default or qualified_name(node) == "aten::baddbmm":
        names = [source for source in cast("list[Node]", node.args[1:3]) if source is not operand]
    return names[0]


def grouped_ends(unit: Unit, args: tuple[Any, ...]) -> Tensor | None:
    """Where the rows of each expert end, from the arguments of a grouped product."""
    return cast(Tensor, args[2]) if unit.product.is_grouped else None


def check_widths(units: Sequence[Unit], patterns: Sequence[Pattern], pad: bool) -> None:
    """Check that groups fit the layers.

    Raises:
        InputError: a group width does not divide a layer's inputs; names the module.
    """
    for unit in units:
        length = unit.product.reduction
        wrong = sorted({p.m for p in patterns if length % p.m})
        if wrong and not pad and not unit.is_left_dense:
            fitting = [width for width in WIDTHS if length % width == 0]
            raise InputError(
                f"pass 'flow': {path_of(unit.product)!r} has {length} inputs, which groups of "
                f"{wrong[0]} do not divide",
                f"use m from {fitting}, set `pad: true`, or keep the module dense",
            )


def _place_of_x(node: Node) -> int:
    return 1 if node.target in (aten.addmm.default, aten.baddbmm.default) else 0


def _move(operand: Node, weight: Tensor) -> Tensor:
    """Do to a tensor what lies between the weight and the product."""
    if operand.op == "get_attr":
        return weight
    moved = _move(operand.all_input_nodes[0], weight)
    return cast(Any, operand.target)(moved, *operand.args[1:], **operand.kwargs)


def _is_same_memory(matrices: Tensor, weight: Tensor) -> bool:
    """Whether the matrices of a weight are its elements in their order."""
    both = matrices.is_contiguous() and weight.is_contiguous()
    return both and matrices.data_ptr() == weight.data_ptr()


def _only_moves(operand: Node) -> bool:
    while operand.op != "get_attr":
        if not aliases_input(operand) or len(operand.all_input_nodes) != 1:
            return False
        operand = operand.all_input_nodes[0]
    return True


def _reason_to_leave(product: WeightProduct, layer: Layer) -> str | None:
    """Why a product is left alone; None if it is pruned."""
    if len(product.weights) != 1 or not _only_moves(product.operand):
        return "its weight is computed from others"
    if product.outputs == 1 or _chooses(product.node):
        return "a router or gate"
    roles = [
        role
        for mixer in layer.mixers
        if (spec := spec_of(mixer)) is not None and spec.name != "attention"
        for role, node in layer.projections_of(mixer).items()
        if node is product.node
    ]
    if roles and not _MAIN_ROLES & set(roles):
        return f"it feeds the recurrence's {roles[0]}"
    return None


def _chooses(linear: Node) -> bool:
    """Whether a layer's output is ranked before another layer takes it."""
    pending, seen = list(linear.users), set[Node]()
    while pending:
        node = pending.pop()
        if node in seen or node.op == "output":
            continue
        seen.add(node)
        spec = spec_of(node)
        if is_linear(node) or (spec is not None and spec.kind in ("mixer", "norm")):
            continue
        if qualified_name(node) in _CHOICES:
            return True
        pending.extend(node.users)
    return False


def _matches(path: str, layer: int, patterns: Sequence[str]) -> bool:
    return any(pattern == str(layer) or fnmatch.fnmatch(path, pattern) for pattern in patterns)


def _check_patterns(
    units: Sequence[Unit], left: dict[str, str], patterns: Sequence[str], field: str
) -> None:
    known = [(path_of(unit.product), unit.layer) for unit in units] + [(p, -1) for p in left]
    for pattern in patterns:
        if not any(_matches(path, layer, [pattern]) for path, layer in known):
            raise InputError(
                f"pass 'flow': {pattern!r} in '{field}' matches no linear layer inside a block",
                f"the first ones are: {', '.join(path for path, _ in known[:4]) or 'none'}",
            )


def _check_weights(program: Program, units: Sequence[Unit]) -> None:
    readers: dict[int, list[str]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        tensor = program.weight(str(node.target))
        readers.setdefault(id(tensor), []).extend(user.name for user in node.users)
    for unit in units:
        weight = program.weight(unit.weight)
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise InputError(
                f"pass 'flow': weight {unit.weight!r} is quantised ({weight.dtype})",
                "prune first, then quantise",
            )
        if len(readers[id(weight)]) > 1 and not unit.is_left_dense:
            raise InputError(
                f"pass 'flow': weight {unit.weight!r} is shared by {readers[id(weight)]}",
                "name it in 'keep_dense', or give each layer a weight of its own",
            )
