"""Linear layers: their weights, and their column-parallel and row-parallel forms.

Of y = W x + b, a column-parallel layer keeps some rows of W (features of y); a row-parallel one
keeps some columns (features of x), and its results are added up over the processes before b is
(Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxgraft import collectives
from fxgraft import graph as graphs
from fxgraft.collectives import Share
from fxgraft.kernels.spec import argument, dims
from fxgraft.passes.shard import experts
from fxgraft.program import Program

aten = torch.ops.aten
_PART = re.compile(r"(?P<stem>.+?)[._]part_\d+(?P<leaf>(\.\w+)?)")


@dataclass(frozen=True)
class Linear:
    """A linear node and its weights; of experts, one weight for each of them.

    Attributes:
        node: ``aten.linear``, ``aten.addmm``, or a grouped product with its bias, if any.
        weight: name of its weight.
        bias: name of its bias, or None.
        rows_first: whether the weight is stored [..., out, in] (else [..., in, out]).
        source: the node it multiplies.
        product: ``node``, or without the bias of experts.
    """

    node: Node
    weight: str
    bias: str | None
    rows_first: bool
    source: Node
    product: Node

    def matrix(self, program: Program) -> Tensor:
        """The weight as [..., out, in]."""
        stored = program.weight(self.weight).detach()
        return stored if self.rows_first else stored.mT

    @property
    def is_grouped(self) -> bool:
        """Whether there is one weight per expert."""
        return experts.is_grouped(self.product)


def linear_of(node: Node) -> Linear | None:
    """A linear node with stored weights, or None for any other node."""
    if node.target is aten.linear.default:
        source, weight, bias, rows_first = node.args[0], node.args[1], argument(node, "bias"), True
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, source, weight = node.args[:3]
        rows_first = False
    else:
        return _grouped(node)
    names = [str(n.target) for n in (weight, bias) if isinstance(n, Node) and n.op == "get_attr"]
    if len(names) != (1 if bias is None else 2) or not isinstance(source, Node):
        return None
    return Linear(node, names[0], names[1] if bias is not None else None, rows_first, source, node)


def _grouped(node: Node) -> Linear | None:
    product, bias = node, None
    if (found := experts.bias_of(node)) is not None:
        product, rows = found
        bias = str(rows.all_input_nodes[0].target)
    stored = experts.stored_weight(product) if experts.is_grouped(product) else None
    source = product.args[0] if product.args else None
    if stored is None or not isinstance(source, Node):
        return None
    weight, rows_first = stored
    return Linear(node, str(weight.target), bias, rows_first, source, product)


def store(program: Program, anchor: Node, name: str, like: Tensor, value: Tensor) -> Node:
    """Store a copy of ``value`` under a name, a parameter if ``like`` is one, and read it."""
    # A view would keep the whole weight in memory.
    own = value.clone(memory_format=torch.contiguous_format)
    kept = nn.Parameter(own, requires_grad=False) if isinstance(like, nn.Parameter) else own
    graphs.set_weight(program.graph_module, name, kept)
    return graphs.insert_weight(program.graph_module, anchor, name)


def keep_rows(program: Program, linear: Linear, rows: Tensor) -> Node:
    """The linear with some of its output features, as a new part of it.

    Returns:
        A node that nothing reads yet.
    """
    taken = {name for name, _ in program.weights()}
    number = 0
    while part_name(linear.weight, number) in taken:
        number += 1
    old, anchor = program.weight(linear.weight), linear.node
    kept = linear.matrix(program)[..., rows, :]
    weight = store(program, anchor, part_name(linear.weight, number), old, kept)
    bias = None
    if linear.bias is not None:
        values = program.weight(linear.bias)
        name = part_name(linear.bias, number)
        bias = store(program, anchor, name, values, values.detach()[..., rows])
    return _multiply(anchor, linear, weight, bias)


def part_name(weight: str, number: int) -> str:
    """A name for some rows of a weight; ``merge_parts`` takes the number off if it can."""
    stem, dot, leaf = weight.rpartition(".")
    if leaf in ("weight", "bias"):
        return f"{stem}.part_{number}{dot}{leaf}"
    return f"{weight}_part_{number}"


def whole_name(part: str) -> str | None:
    """The name of the weight that a part's name tells of; None if it names no part."""
    found = _PART.fullmatch(part)
    return found["stem"] + found["leaf"] if found else None


def _multiply(anchor: Node, linear: Linear, weight: Node, bias: Node | None) -> Node:
    """Insert the product of ``linear`` with another weight [..., out, in] and bias."""
    if not linear.is_grouped:
        args = (linear.source, weight) if bias is None else (linear.source, weight, bias)
        return graphs.insert(anchor, aten.linear.default, args)
    turned = graphs.insert(anchor, aten.transpose.int, (weight, -2, -1))
    old = linear.product
    args = (linear.source, turned, *old.args[2:])
    product = graphs.insert(anchor, old.target, args, dict(old.kwargs))  # pyright: ignore[reportArgumentType]
    if bias is None:
        return product
    found = experts.bias_of(linear.node)
    assert found is not None
    rows = graphs.insert(anchor, aten.index.Tensor, (bias, found[1].args[1]))
    return graphs.insert(anchor, aten.add.Tensor, (product, rows))


def row_parallel(program: Program, linear: Linear, columns: Tensor, share: Share) -> None:
    """Replace a linear by one with some of the features of its input, which has only those by now.

    Its results are added up over the processes.
    """
    old, anchor = program.weight(linear.weight), linear.node
    kept = linear.matrix(program)[..., columns]
    weight = store(program, anchor, linear.weight, old, kept)
    if linear.is_grouped:
        _finish_experts(program, linear, weight, share)
        return
    bias = argument(anchor, "bias") if linear.rows_first else anchor.args[0]
    local = _multiply(anchor, linear, weight, bias if isinstance(bias, Node) else None)
    anchor.replace_all_uses_with(local)
    finish_row_parallel(local, share)


def _finish_experts(program: Program, linear: Linear, weight: Node, share: Share) -> None:
    bias = None
    if linear.bias is not None:
        # The rows are weighted before they are added up, so one process brings the bias.
        values = program.weight(linear.bias)
        own = values.detach() if share.rank == 0 else torch.zeros_like(values)
        bias = store(program, linear.node, linear.bias, values, own)
    local = _multiply(linear.node, linear, weight, bias)
    linear.node.replace_all_uses_with(local)
    together = experts.meeting(local)
    users = list(together.users)
    total = collectives.add_up(together, share)
    for user in users:
        user.replace_input_with(together, total)


def finish_row_parallel(node: Node, share: Share) -> None:
    """Add a linear's results up over the processes, and its bias once."""
    bias = argument(node, "bias")
    node.args = node.args[:2]
    users = list(node.users)
    total = collectives.add_up(node, share)
    if isinstance(bias, Node):
        total = graphs.insert(total, aten.add.Tensor, (total, bias), after=True)
    for user in users:
        user.replace_input_with(node, total)


def merge_parts(program: Program) -> None:
    """Make the parts of one layer that read the same tensor one layer again, with its old name.

    Parts of a layer that something else still reads as a whole are left alone.
    """
    groups: dict[tuple[str, Node], list[Linear]] = defaultdict(list)
    taken = {name for name, _ in program.weights()}
    for node in program.graph.nodes:
        linear = linear_of(node)
        base = whole_name(linear.weight) if linear else None
        if linear and base and base not in taken and experts.with_bias(node) is node:
            groups[base, linear.source].append(linear)
    for (base, _), parts in groups.items():
        if sum(name == base for name, _ in groups) == 1:
            _merge(program, base, parts)
    graphs.finish(program.graph_module)


def _merge(program: Program, base: str, parts: list[Linear]) -> None:
    anchor = parts[0].node
    weight = _joined(program, anchor, base, [part.weight for part in parts], dim=-2)
    biases = [part.bias for part in parts if part.bias is not None]
    name = whole_name(biases[0]) if biases else None
    bias = _joined(program, anchor, name, biases, dim=-1) if name else None
    merged = _multiply(anchor, parts[0], weight, bias)
    if len(parts) == 1:
        anchor.replace_all_uses_with(merged)
        return
    sizes = [int(dims(part.node)[-1]) for part in parts]  # pyright: ignore[reportArgumentType]
    split = graphs.insert(anchor, aten.split_with_sizes.default, (merged, sizes, -1))
    for index, part in enumerate(parts):
        piece = graphs.insert(part.node, operator.getitem, (split, index))
        part.node.replace_all_uses_with(piece)


def _joined(program: Program, anchor: Node, name: str, names: list[str], dim: int) -> Node:
    values = [program.weight(each) for each in names]
    if len(values) == 1:
        graphs.set_weight(program.graph_module, name, values[0])
        return graphs.insert_weight(program.graph_module, anchor, name)
    whole = torch.cat([value.detach() for value in values], dim)
    return store(program, anchor, name, values[0], whole)
