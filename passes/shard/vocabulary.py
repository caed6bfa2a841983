"""The vocabulary: every process keeps the embeddings and the logits of some tokens.

A token's embedding is zero where another process holds it, and added up over the processes; the
logits are joined, so that all processes sample from the same ones (Megatron-LM, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxgraft import collectives
from fxgraft import graph as graphs
from fxgraft.collectives import Share
from fxgraft.errors import InputError
from fxgraft.kernels.spec import dims
from fxgraft.operators import operator_of
from fxgraft.passes.prune_heads.heads import moves_data, op_name
from fxgraft.passes.shard.linears import Linear, linear_of
from fxgraft.program import Program

aten = torch.ops.aten
_ROW_WISE = frozenset({"aten::slice", "aten::to", "aten::_to_copy", "aten::alias"})


@dataclass(frozen=True)
class Vocabulary:
    """Where a model meets tokens.

    Attributes:
        tokens: how many there are.
        embedding: the node that looks them up.
        head: the layer that gives their logits.
    """

    tokens: int
    embedding: Node
    head: Linear


def find_vocabulary(program: Program, size: int) -> Vocabulary:
    """The embedding and the head of a language model, for ``size`` processes.

    Raises:
        InputError: there is no such pair, or its tokens cannot be divided evenly.
    """
    head = _head(program)
    embedding = next(iter(_embeddings(program)), None)
    if head is None or embedding is None or not _are_plain(program, head, embedding):
        raise InputError(
            "pass 'shard': field 'vocabulary' is 'split', but the model has no embedding of "
            "input_ids and linear layer before its logits that can be split",
            "use 'replicate'",
        )
    tokens = int(dims(head.node)[-1])  # pyright: ignore[reportArgumentType]
    if tokens % size or program.weight(_name(embedding)).shape[0] != tokens:
        raise InputError(
            f"pass 'shard': field 'vocabulary' is 'split', but {tokens} tokens cannot be divided "
            f"evenly among {size} processes",
            "use 'replicate'",
        )
    return Vocabulary(tokens, embedding, head)


def _head(program: Program) -> Linear | None:
    """Walk back from the logits over what treats every token alike."""
    node = program.output_nodes.get("logits")
    while node is not None:
        linear = linear_of(node)
        if linear is not None:
            return linear
        target = operator_of(node)
        is_pointwise = target is not None and torch.Tag.pointwise in target.tags
        sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        alike = len(sources) == 1 and dims(sources[0])[-1:] == dims(node)[-1:]
        node = sources[0] if alike and (is_pointwise or op_name(node) in _ROW_WISE) else None
    return None


def _embeddings(program: Program) -> list[Node]:
    nodes = program.graph.find_nodes(op="call_function", target=aten.embedding.default)
    return [n for n in nodes if n.all_input_nodes[0].op == "get_attr" and _looks_up_tokens(n)]


def _looks_up_tokens(embedding: Node) -> bool:
    index = embedding.all_input_nodes[-1]
    while moves_data(index):
        index = index.all_input_nodes[0]
    return index.op == "placeholder" and index.target == "input_ids"


def _name(embedding: Node) -> str:
    return str(embedding.all_input_nodes[0].target)


def _are_plain(program: Program, head: Linear, embedding: Node) -> bool:
    """Whether nothing else reads the weights."""
    names = {head.weight, _name(embedding), *([head.bias] if head.bias else [])}
    readers = {
        user
        for node in program.graph.find_nodes(op="get_attr")
        if str(node.target) in names
        for user in node.users
    }
    return readers == {head.node, embedding}


def shard_vocabulary(program: Program, share: Share) -> None:
    """Keep this process's tokens.

    Raises:
        InputError: see ``find_vocabulary``.
    """
    found = find_vocabulary(program, share.size)
    count = found.tokens // share.size
    start = share.rank * count
    names = [_name(found.embedding), found.head.weight]
    names += [found.head.bias] if found.head.bias is not None else []
    kept: dict[int, Tensor] = {}
    for name in dict.fromkeys(names):
        old = program.weight(name)
        is_head_t = name == found.head.weight and not found.head.rows_first
        cut = old.detach()[:, start : start + count] if is_head_t else old[start : start + count]
        kept.setdefault(id(old), _own(old, cut))
        program_weight = kept[id(old)]
        graphs.set_weight(program.graph_module, name, program_weight)
    readers = [n for n in program.graph.find_nodes(op="get_attr") if str(n.target) in names]
    for node in readers:
        node.meta["val"] = graphs.evaluate(node)
    _local_embedding(found.embedding, start, count, share)
    head = found.head.node
    head.meta["val"] = graphs.evaluate(head)
    users = list(head.users)
    logits = collectives.join_last(head, share)
    for user in users:
        user.replace_input_with(head, logits)
    graphs.finish(program.graph_module)


def _own(old: Tensor, cut: Tensor) -> Tensor:
    # A view would keep the whole weight in memory.
    own = cut.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(own, requires_grad=False) if isinstance(old, nn.Parameter) else own


def _local_embedding(node: Node, start: int, count: int, share: Share) -> None:
    """Embeddings of this process's tokens and zero for others, added up."""
    weight, ids = node.args[:2]

    def call(target: object, *args: object) -> Node:
        return graphs.insert(node, target, args)  # pyright: ignore[reportArgumentType]

    local = call(aten.sub.Tensor, ids, start)
    held = call(aten.logical_and.default, call(aten.ge.Scalar, local, 0),
                call(aten.lt.Scalar, local, count))  # fmt: skip
    safe = call(aten.where.ScalarOther, held, local, 0)
    found = call(aten.embedding.default, weight, safe)
    masked = call(aten.mul.Tensor, found, call(aten.unsqueeze.default, held, -1))
    users = list(node.users)
    total = collectives.add_up(masked, share)
    for user in users:
        user.replace_input_with(node, total)
