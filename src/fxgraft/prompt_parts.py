"""Which tokens belong to prompts and which to answers, told to a graph by one input."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.kernels.spec import dims
from fxgraft.program import Input, Program
from fxgraft.state import PROMPT_LENGTH

aten = torch.ops.aten


def prompt_length(program: Program) -> Node:
    """The input int64 [B], added if missing: the number of a prompt's tokens; 0: all so far."""
    existing, tokens = _input(program, PROMPT_LENGTH), _input(program, "input_ids")
    if existing is not None:
        return existing
    assert tokens is not None
    last = program.placeholders[-1]
    with program.graph.inserting_after(last):
        node = program.graph.placeholder(PROMPT_LENGTH)
    ids = tokens.meta["val"]
    node.meta["val"] = ids.new_empty(ids.shape[:1], dtype=torch.int64)
    graphs.inherit(node, last)
    shape = (program.input("input_ids").shape[0],)
    program.inputs = (*program.inputs, Input(PROMPT_LENGTH, torch.int64, shape, "zeros"))
    return node


def share_sizes(node: Node, ids: Node) -> None:
    """Give an input of the tokens' shape their symbols, where capture gave it some of its own."""
    value, wanted = node.meta["val"], ids.meta["val"]
    if dims(node) != dims(ids):
        node.meta["val"] = wanted.new_empty(wanted.shape, dtype=value.dtype)
        graphs.refresh(node.users)


def tell_types_by_length(program: Program) -> None:
    """Compute an input that only tells prompts from answers, in place, if there is one."""
    spec = next((spec for spec in program.inputs if spec.default == "prompts"), None)
    types = None if spec is None else _input(program, spec.name)
    if types is None:
        return
    length = prompt_length(program)
    ids, mask = (_input(program, name) for name in ("input_ids", "attention_mask"))
    assert ids is not None
    if mask is not None:
        share_sizes(mask, ids)
    first = next(node for node in program.graph.nodes if node.op != "placeholder")
    given = graphs.insert(first, aten.unsqueeze.default, (length, 1))
    late = graphs.insert(first, aten.ge.Tensor, (_position(program, ids, mask, first), given))
    has_end = graphs.insert(first, aten.gt.Scalar, (given, 0))
    answers = graphs.insert(first, aten.logical_and.default, (late, has_end))
    dtype = types.meta["val"].dtype
    told = graphs.insert(first, aten.to.dtype, (answers, dtype))
    types.replace_all_uses_with(told)
    graphs.refresh(told.users)


def _input(program: Program, name: str) -> Node | None:
    return next((node for node in program.placeholders if node.name == name), None)


def _position(program: Program, ids: Node, mask: Node | None, anchor: Node) -> Node:
    """int64 [B, S] or [1, S]: tokens that are no padding, counted from 0."""
    if mask is not None:
        counted = graphs.insert(anchor, aten.cumsum.default, (mask, 1))
        return graphs.insert(anchor, aten.sub.Tensor, (counted, 1))
    length = graphs.insert(anchor, aten.sym_size.int, (ids, 1))
    row = graphs.insert(anchor, aten.arange.default, (length,), {"device": program.device})
    return graphs.insert(anchor, aten.unsqueeze.default, (row, 0))
