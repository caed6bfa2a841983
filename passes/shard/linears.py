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
from fxgraft.program import Program

aten = torch.ops.aten
_PART = re.compile(r"(?P<base>.+)\.part_\d+\.weight")


@dataclass(frozen=True)
class Linear:
    """A linear node and its weights.

    Attributes:
        node: ``aten.linear`` or ``aten.addmm``.
        weight: name of its weight.
        bias: name of its bias, or None.
        rows_first: whether the weight is stored [out, in] (else [in, out]).
        source: the node it multiplies.
    """

    node: Node
    weight: str
    bias: str | None
    rows_first: bool
    source: Node

    def matrix(self, program: Program) -> Tensor:
        """The weight as [out, in]."""
        stored = program.weight(self.weight).detach()
        return stored if self.rows_first else stored.T


def linear_of(node: Node) -> Linear | None:
    """A linear node with stored weights, or None for any other node."""
    if node.target is aten.linear.default:
        source, weight, bias, rows_first = node.args[0], node.args[1], argument(node, "bias"), True
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, source, weight = node.args[:3]
        rows_first = False
    else:
        return None
    names = [str(n.target) for n in (weight, bias) if isinstance(n, Node) and n.op == "get_attr"]
    if len(names) != (1 if bias is None else 2) or not isinstance(source, Node):
        return None
    return Linear(node, names[0], names[1] if bias is not None else None, rows_first, source)


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
    name = _part_name(program, linear.weight)
    old, anchor = program.weight(linear.weight), linear.node
    args = [linear.source]
    args.append(store(program, anchor, f"{name}.weight", old, linear.matrix(program)[rows]))
    if linear.bias is not None:
        bias = program.weight(linear.bias)
        args.append(store(program, anchor, f"{name}.bias", bias, bias.detach()[rows]))
    return graphs.insert(anchor, aten.linear.default, tuple(args))


def _part_name(program: Program, weight: str) -> str:
    """A free name for some rows of a weight; ``merge_parts`` removes the number if it can."""
    base, number = weight.removesuffix(".weight"), 0
    taken = {name for name, _ in program.weights()}
    while f"{base}.part_{number}.weight" in taken:
        number += 1
    return f"{base}.part_{number}"


def keep_columns(program: Program, linear: Linear, columns: Tensor) -> Node:
    """The linear with some of the features of its input, which has only those by now.

    Returns:
        A node that nothing reads yet.
    """
    old, anchor = program.weight(linear.weight), linear.node
    weight = store(program, anchor, linear.weight, old, linear.matrix(program)[:, columns])
    bias = argument(anchor, "bias") if linear.rows_first else anchor.args[0]
    args = (linear.source, weight) if bias is None else (linear.source, weight, bias)
    return graphs.insert(anchor, aten.linear.default, args)


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
    for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        linear = linear_of(node)
        found = _PART.fullmatch(linear.weight) if linear else None
        if linear and found and f"{found['base']}.weight" not in taken:
            groups[found["base"], linear.source].append(linear)
    for (base, source), parts in groups.items():
        if sum(name == base for name, _ in groups) == 1:
            _merge(program, base, source, parts)
    graphs.finish(program.graph_module)


def _merge(program: Program, base: str, source: Node, parts: list[Linear]) -> None:
    anchor = parts[0].node
    args = [source, _joined(program, anchor, f"{base}.weight", [part.weight for part in parts])]
    biases = [part.bias for part in parts if part.bias is not None]
    if biases:
        args.append(_joined(program, anchor, f"{base}.bias", biases))
    merged = graphs.insert(anchor, aten.linear.default, tuple(args))
    if len(parts) == 1:
        anchor.replace_all_uses_with(merged)
        return
    sizes = [int(dims(part.node)[-1]) for part in parts]  # pyright: ignore[reportArgumentType]
    split = graphs.insert(anchor, aten.split_with_sizes.default, (merged, sizes, -1))
    for index, part in enumerate(parts):
        piece = graphs.insert(part.node, operator.getitem, (split, index))
        part.node.replace_all_uses_with(piece)


def _joined(program: Program, anchor: Node, name: str, names: list[str]) -> Node:
    values = [program.weight(each) for each in names]
    if len(values) == 1:
        graphs.set_weight(program.graph_module, name, values[0])
        return graphs.insert_weight(program.graph_module, anchor, name)
    return store(program, anchor, name, values[0], torch.cat([v.detach() for v in values]))
