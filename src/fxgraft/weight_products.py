"""Products of a value with a weight: every linear layer of a Program, however it is written.

Recognised are ``aten.linear``, ops of ``fxgraft`` of kind ``"linear"``, and ``mm``, ``addmm``,
``matmul``, ``bmm``, ``baddbmm`` and grouped products whose second operand follows from weights
alone (a transposed weight, for example), or the first one of ``W x``. Convolutions and ``einsum``
are not among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxgraft.graph import weight_of
from fxgraft.kernels.spec import Expr, PackedWeight, argument, dims, expr, spec_of
from fxgraft.operators import operator_of, qualified_name
from fxgraft.program import Program

# Operand names of x and of a weight that is stored [..., K, O].
_PRODUCTS = {
    "aten::mm": ("self", "mat2"),
    "aten::addmm": ("mat1", "mat2"),
    "aten::matmul": ("self", "other"),
    "aten::bmm": ("self", "mat2"),
    "aten::baddbmm": ("batch1", "batch2"),
    "aten::_grouped_mm": ("self", "mat2"),
    "transformers::grouped_mm_fallback": ("input", "weight"),
}


@dataclass(frozen=True)
class WeightProduct:
    """A node that computes ``y = x Wᵀ`` with one weight, or with each of several.

    Attributes:
        node: the node.
        operand: what it takes as the weight: the weight's node or a view of it.
        weights: names of the weights that the operand is made of.
        copies: number of matrices; each row of x meets one of them (experts) if ``is_grouped``,
            else x holds the same number of rows for each.
        outputs, reduction: O and K of one matrix.
        rows: T, rows of x for all copies together, over the graph's symbols.
        is_transposed: the operand is [..., K, O] rather than [..., O, K].
        is_grouped: rows are sorted by the matrix that they meet.
        pattern: N and M, where the weight is stored packed with N of each M neighbours along K.
    """

    node: Node
    operand: Node
    weights: tuple[str, ...]
    copies: int
    outputs: int
    reduction: int
    rows: Expr
    is_transposed: bool
    is_grouped: bool
    pattern: tuple[int, int] | None = None

    def matrices(self, program: Program) -> Tensor:
        """The weight's values [copies, O, K]; on the meta device if the Program has none."""
        packed = _packed(self.node)
        if packed is not None:
            parts = (cast(Node, argument(self.node, name)) for name in packed.arguments)
            with torch.no_grad():
                dense = packed.unpack(self.node, [_compute(part, program) for part in parts])
                return dense.reshape(-1, self.outputs, self.reduction)
        value = _compute(self.operand, program)
        value = value.transpose(-1, -2) if self.is_transposed else value
        return value.reshape(-1, self.outputs, self.reduction)


def weight_products(program: Program) -> dict[Node, WeightProduct]:
    """Every product with a weight, in graph order."""
    constants = _weight_values(program)
    found: dict[Node, WeightProduct] = {}
    for node in program.graph.nodes:
        packed = _packed(node)
        if packed is not None:
            _add_packed(node, packed, constants, found)
            continue
        operands = _operands(node)
        if operands is None:
            continue
        x, weight, is_transposed = operands
        is_left = x in constants and weight not in constants and _may_be_left(node)
        if is_left:
            x, weight, is_transposed = weight, x, False
        if weight not in constants or x in constants:
            continue
        shape = dims(weight)
        if len(shape) < 2 or not all(size.is_Integer for size in shape):
            continue
        sizes = [int(cast(Any, size)) for size in shape]
        inner, outputs = sizes[-2:] if is_transposed else reversed(sizes[-2:])
        rows = math.prod(dims(x), start=expr(1)) / inner
        found[node] = WeightProduct(
            node, weight, constants[weight], math.prod(sizes[:-2]), outputs, inner, rows,
            is_transposed, "grouped" in qualified_name(node),
        )  # fmt: skip
    return found


def _packed(node: Node) -> PackedWeight | None:
    spec = spec_of(node)
    return None if spec is None else spec.packed


def _add_packed(
    node: Node,
    packed: PackedWeight,
    constants: Mapping[Node, tuple[str, ...]],
    found: dict[Node, WeightProduct],
) -> None:
    x, weight = argument(node, "x"), argument(node, packed.arguments[0])
    if not isinstance(x, Node) or not isinstance(weight, Node) or weight not in constants:
        return
    outputs, inner = (int(cast(Any, size)) for size in packed.shape(node))
    rows = math.prod(dims(x), start=expr(1)) / inner
    experts = packed.experts(node)
    found[node] = WeightProduct(
        node, weight, constants[weight], experts or 1, outputs, inner, rows,
        is_transposed=False, is_grouped=experts is not None, pattern=packed.pattern(node),
    )  # fmt: skip


def _may_be_left(node: Node) -> bool:
    """Whether the product may be written ``W x``, with columns of x for rows."""
    return qualified_name(node) in ("aten::mm", "aten::matmul", "aten::bmm")


def _operands(node: Node) -> tuple[Node, Node, bool] | None:
    """x, the weight, and whether it is stored [..., K, O]; None for other nodes."""
    spec = spec_of(node)
    if spec is not None and spec.kind == "linear":
        x, weight, is_transposed = argument(node, "x"), argument(node, "weight"), False
    elif operator_of(node) is torch.ops.aten.linear.default:
        x, weight, is_transposed = argument(node, "input"), argument(node, "weight"), False
    elif operator_of(node) is not None and (names := _PRODUCTS.get(qualified_name(node))):
        x, weight, is_transposed = argument(node, names[0]), argument(node, names[1]), True
    else:
        return None
    return (x, weight, is_transposed) if isinstance(x, Node) and isinstance(weight, Node) else None


def _weight_values(program: Program) -> dict[Node, tuple[str, ...]]:
    """Nodes that follow from weights alone, with the names of those weights."""
    found: dict[Node, tuple[str, ...]] = {}
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr":
            found[node] = (str(node.target),)
        elif operator_of(node) is not None and sources and all(s in found for s in sources):
            names = (name for source in sources for name in found[source])
            found[node] = tuple(dict.fromkeys(names))
    return found


def _compute(node: Node, program: Program) -> Tensor:
    """The value of a node that follows from weights alone."""
    if node.op == "get_attr":
        return weight_of(program.graph_module, str(node.target))
    args = map_arg(node.args, lambda source: cast(Any, _compute(source, program)))
    kwargs = map_arg(node.kwargs, lambda source: cast(Any, _compute(source, program)))
    target = cast(Callable[..., Tensor], node.target)
    with torch.no_grad():
        return target(*cast("tuple[Any, ...]", args), **cast("dict[str, Any]", kwargs))
