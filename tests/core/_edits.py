"""Small Programs, and edits that stand for what passes do to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.describe import module_of, short_name
from fxgraft.frontends import capture
from fxgraft.frontends.exporting import export
from fxgraft.program import Input, Program
from fxgraft.symbolic import fake_inputs
from tests import models

aten = torch.ops.aten
WIDTH, HEADS, VOCABULARY = 8, 4, 50


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, 2 * WIDTH)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.up_proj(x)))


class Block(nn.Module):
    """A pre-norm residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(WIDTH)
        self.self_attn = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Body(nn.Module):
    """Embedding and blocks."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Net(nn.Module):
    """A language model whose graph depends on torch alone."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
        self.model = Body(num_layers)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.lm_head(self.model(input_ids))}


@functools.cache
def net(num_layers: int = 4) -> Program:
    """The language model; copy it before editing."""
    spec = Input("input_ids", torch.int64, ("batch", "sequence"), high=VOCABULARY)
    values = {"input_ids": torch.zeros(2, 7, dtype=torch.int64)}
    return export(Net(num_layers), (spec,), values)


@functools.cache
def llama() -> Program:
    """A tiny Llama; copy it before editing."""
    return capture(models.llama(num_hidden_layers=4))


def program_of(
    model: nn.Module,
    values: Mapping[str, torch.Tensor],
    dynamic: Mapping[str, tuple[int | str, ...]],
) -> Program:
    """A module called with ``values`` as a Program; ``dynamic`` gives shapes with names."""
    specs = tuple(Input(name, value.dtype, dynamic[name]) for name, value in values.items())
    return export(model, specs, values)


def find(program: Program, module: str, name: str, place: int = 0) -> Node:
    """The call of op ``name`` in a module, the first or another of its equals."""
    found = [n for n in program.graph.nodes if n.op == "call_function" and module_of(n) == module]
    return [node for node in found if short_name(node) == name][place]


def insert_behind(node: Node, target: Callable[..., Any], *constants: object) -> Node:
    """Put a unary op between a node and all its readers."""
    readers = list(node.users)
    inserted = graphs.insert(node, target, (node, *constants), after=True)
    for reader in readers:
        reader.replace_input_with(node, inserted)
    return inserted


def bypass(node: Node) -> None:
    """Remove a node whose readers can take its first input instead."""
    source = node.args[0]
    assert isinstance(source, Node)
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def steered(program: Program, *layers: int) -> Program:
    """With a vector added to the residual stream after the given layers."""
    edited = program.copy()
    graphs.set_weight(edited.graph_module, "steer.vector", torch.ones(WIDTH))
    with graphs.made_by("seal"):
        for layer in layers:
            add = find(edited, f"model.layers.{layer}", "add", -1)
            inserted = insert_behind(add, aten.add.Tensor, 1.0)
            vector = graphs.insert_weight(edited.graph_module, inserted, "steer.vector")
            inserted.update_arg(1, vector)
    graphs.finish(edited.graph_module)
    return edited


def merged(program: Program, num_layers: int = 4) -> Program:
    """With the query, key and value projections of every layer as one."""
    edited = program.copy()
    with graphs.made_by("optimize"):
        for layer in range(num_layers):
            _merge(edited, f"model.layers.{layer}.self_attn")
    graphs.finish(edited.graph_module)
    return edited


def _merge(program: Program, attention: str) -> None:
    names = [f"{attention}.{part}_proj" for part in ("q", "k", "v")]
    linears = [find(program, name, "linear") for name in names]
    weights = [program.weight(f"{name}.weight") for name in names]
    graphs.set_weight(program.graph_module, f"{attention}.qkv_proj.weight", torch.cat(weights))
    weight = graphs.insert_weight(program.graph_module, linears[0], f"{attention}.qkv_proj.weight")
    joined = graphs.insert(linears[0], aten.linear.default, (linears[0].args[0], weight))
    start = 0
    for linear, part in zip(linears, weights, strict=True):
        end = start + part.shape[0]
        linear.replace_all_uses_with(
            graphs.insert(linear, aten.slice.Tensor, (joined, 2, start, end))
        )
        start = end


def pruned(program: Program, layer: int) -> Program:
    """With half of the attention heads of a layer removed."""
    edited = program.copy()
    attention = f"model.layers.{layer}.self_attn"
    for part in ("q", "k", "v"):
        weight = edited.weight(f"{attention}.{part}_proj.weight")
        half = weight[: weight.shape[0] // 2]
        graphs.set_weight(edited.graph_module, f"{attention}.{part}_proj.weight", half)
    weight = edited.weight(f"{attention}.o_proj.weight")
    half = weight[:, : weight.shape[1] // 2]
    graphs.set_weight(edited.graph_module, f"{attention}.o_proj.weight", half)
    graphs.propagate(edited.graph_module)
    return edited


def renamed(program: Program) -> Program:
    """The same Program with other node names."""
    copy = program.copy()
    for number, node in enumerate(copy.graph.nodes):
        if node.op not in ("placeholder", "output"):
            node._rename(f"node_{9000 - number}")
    return copy


def renumbered(program: Program) -> Program:
    """The same Program with other node names and other symbols."""
    copy = renamed(program)
    values = fake_inputs(copy.inputs, dict(reversed(copy.dimensions.items())))
    for node, value in zip(copy.placeholders, values, strict=True):
        node.meta["val"] = value
    graphs.propagate(copy.graph_module)
    return copy
