"""Inserting a linear-attention branch beside a softmax attention."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.errors import InputError
from fxgraft.kernels.spec import dims
from fxgraft.passes.dsla.form import Form, stored
from fxgraft.passes.dsla.sites import Site
from fxgraft.program import Input, Program

aten = torch.ops.aten
fx = torch.ops.fxgraft
CHOICE = "dsla_layer_"
"""Inputs that choose, per row, whether a layer is linear; followed by the layer's index."""


@dataclass(frozen=True)
class Branch:
    """The nodes of an inserted branch.

    Attributes:
        site: what it stands beside.
        mixer: the linear-attention node.
        gate: gate logits [B, S, H, N, D].
        output: [B, Hq, S, Dv], in the place of the softmax attention's.
        weights: names of its weights in the Program, by their own name.
    """

    site: Site
    mixer: Node
    gate: Node
    output: Node
    weights: dict[str, str]


def add_branch(
    program: Program, site: Site, form: Form, parameters: Mapping[str, Tensor]
) -> Branch:
    """Insert linear attention beside a softmax attention; nothing reads it yet.

    Args:
        program: is changed.
        site: the attention.
        form: of the layer.
        parameters: of the layer, see ``Form.initial``.

    Raises:
        InputError: the layer's keys have no unrotated form, and the form needs it.
    """
    query, key, plain_key = _inputs(site, form)
    builder = _Builder(program, site, form, {})
    dtype = site.key.meta["val"].dtype
    for name, value in stored(dict(parameters), dtype).items():
        full = f"{site.path}.dsla.{name}"
        builder.names[name] = program.add_weight(full, value.to(program.device))
    gate = builder.gate(plain_key)
    queries = builder.queries(query)
    arguments: list[Any] = [
        builder.rows(queries), builder.rows(key), builder.rows(site.value), gate,
        builder.read("mixing"), builder.read("norm_weight") if form.out_norm == "rms" else None,
        site.key_mask,
    ]  # fmt: skip
    mixer = builder.call(
        fx.linear_attention.default,
        *arguments,
        scale=site.scale,
        temperature=form.temperature,
        floor=form.floor,
        write_scale=form.write_scale,
    )
    output = builder.call(aten.transpose.int, builder.call(operator.getitem, mixer, 0), 1, 2)
    if form.adapt == "heads":
        output = builder.call(aten.matmul.default, output, builder.read("output_map"))
    return Branch(site, mixer, gate, output, builder.names)


def _inputs(site: Site, form: Form) -> tuple[Node, Node, Node]:
    """Queries, keys and unrotated keys; the last are the keys where nothing needs them."""
    needed = form.rope == "none" or form.gate == "key"
    if needed and (site.plain_key is None or site.plain_query is None):
        raise InputError(
            f"the keys of layer {site.layer} ({site.path!r}) are put together from rotated and "
            "other parts, so they have no unrotated form",
            "set rope: keep and gate: lowrank or full in the form, or leave the layer out",
        )
    plain_key = site.key if site.plain_key is None else site.plain_key
    if form.rope == "keep" or site.plain_query is None:
        return site.query, site.key, plain_key
    return site.plain_query, plain_key, plain_key


@dataclass(frozen=True)
class _Builder:
    """Inserts calls in front of the softmax attention."""

    program: Program
    site: Site
    form: Form
    names: dict[str, str]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return graphs.insert(self.site.mixer, target, args, kwargs)

    def read(self, name: str) -> Node:
        return graphs.insert_weight(self.program.graph_module, self.site.mixer, self.names[name])

    def rows(self, node: Node) -> Node:
        """[B, S, H, D] of a node in either layout."""
        return node if self._has_rows(node) else self.call(aten.transpose.int, node, 1, 2)

    def heads(self, node: Node) -> Node:
        """[B, H, S, D] of a node in either layout."""
        return self.call(aten.transpose.int, node, 1, 2) if self._has_rows(node) else node

    def _has_rows(self, node: Node) -> bool:
        length = str(dims(self.site.value)[2])
        return str(dims(node)[1]) == length != str(dims(node)[2])

    def queries(self, query: Node) -> Node:
        if self.form.adapt == "none":
            return query
        return self.call(aten.matmul.default, self.heads(query), self.read("query_map"))

    def gate(self, plain_key: Node) -> Node:
        """Gate logits [B, S, H, N, D]."""
        bias = self.read("gate_bias")
        return self.call(aten.add.Tensor, getattr(self, f"_{self.form.gate}_gate")(plain_key), bias)

    def _key_gate(self, plain_key: Node) -> Node:
        key, heads = self.heads(plain_key), self.form.heads(self.site)
        if heads != self.site.kv_heads:
            group = heads // self.site.kv_heads
            key = self.call(aten.repeat_interleave.self_int, key, group, 1)
        product = self.call(aten.matmul.default, key, self.read("gate_weight"))
        product = self.call(aten.transpose.int, product, 1, 2)
        return self._split(product, [heads, self.form.states, self.site.head_dim])

    def _lowrank_gate(self, _: Node) -> Node:
        states, rank = self.form.states, self.form.rank
        down = self.call(aten.linear.default, self.site.hidden, self.read("gate_down"))
        down = self.call(aten.transpose.int, self._split(down, [states, rank]), 1, 2)
        up = self.call(aten.matmul.default, down, self.read("gate_up"))
        up = self.call(aten.transpose.int, up, 1, 2)
        return self._by_head(up)

    def _full_gate(self, _: Node) -> Node:
        flat = self.call(aten.linear.default, self.site.hidden, self.read("gate_weight"))
        return self._by_head(flat)

    def _by_head(self, flat: Node) -> Node:
        """[B, S, H, N, D] of [B, S, (N, H, D)]."""
        sizes = [self.form.states, self.form.heads(self.site), self.site.head_dim]
        return self.call(aten.transpose.int, self._split(flat, sizes), 2, 3)

    def _split(self, node: Node, sizes: list[int]) -> Node:
        batch = self.call(aten.sym_size.int, node, 0)
        length = self.call(aten.sym_size.int, node, 1)
        return self.call(aten.reshape.default, node, [batch, length, *sizes])


def replace_attention(branch: Branch) -> None:
    """Let everything that read the softmax attention read the branch."""
    branch.site.mixer.replace_all_uses_with(branch.output)


def offer_choice(program: Program, branch: Branch) -> Program:
    """Let each row choose: 0 is softmax, 1 is linear.

    Returns:
        The Program with one more input; the given one shares its graph.
    """
    mixer, layer = branch.site.mixer, branch.site.layer
    name = f"{CHOICE}{layer}"
    ids = next(node for node in program.placeholders if node.name == "input_ids")
    with program.graph.inserting_after(program.placeholders[-1]):
        choice = program.graph.placeholder(name)
    choice.meta["val"] = ids.meta["val"].new_zeros(ids.meta["val"].shape[:1])
    chosen = graphs.insert(
        mixer, fx.choose_rows.default, (choice, [mixer, branch.output]), after=True
    )
    mixer.replace_all_uses_with(chosen, delete_user_cb=lambda user: user is not chosen)
    program.inputs = (
        *program.inputs, Input(name, torch.int64, ("batch",), default="zeros", high=2)
    )  # fmt: skip
    return program
