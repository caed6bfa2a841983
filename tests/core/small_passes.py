"""A small model and small passes, good and faulty, for the tests of the pass machinery."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import torch
from torch import nn

from fxgraft import graph as graphs
from fxgraft.errors import InputError
from fxgraft.frontends.exporting import export
from fxgraft.program import Input, Program
from fxgraft.transform import Effect, Pass

aten = torch.ops.aten
VOCABULARY, WIDTH = 11, 8


class Tiny(nn.Module):
    """Two residual blocks over masked embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids) * attention_mask.unsqueeze(-1)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return {"logits": self.head(x)}


def tiny_program() -> Program:
    """The model as a Program."""
    inputs = (
        Input("input_ids", torch.int64, ("batch", "sequence"), high=VOCABULARY),
        Input("attention_mask", torch.int64, ("batch", "sequence"), default="ones"),
    )
    values = {
        "input_ids": torch.zeros(2, 5, dtype=torch.int64),
        "attention_mask": torch.ones(2, 5, dtype=torch.int64),
    }
    return export(Tiny(), inputs, values)


def calls(program: Program, target: Callable[..., Any]) -> list[torch.fx.Node]:
    """The nodes that call an operator."""
    return list(program.graph.find_nodes(op="call_function", target=target))


class SwapAddends(Pass):
    """Exact: a + b becomes b + a."""

    effect: ClassVar = Effect.EXACT
    looks_for: ClassVar = "additions"

    def run(self, program: Program) -> list[str]:
        nodes = calls(program, aten.add.Tensor)
        for node in nodes:
            node.args = (node.args[1], node.args[0])
        return [f"{len(nodes)} additions"]


class HalvePrecision(Pass):
    """Approximate: round weights to bfloat16 and back."""

    effect: ClassVar = Effect.APPROXIMATE
    removes: ClassVar = frozenset({"dense_weights"})

    tolerance: float = 0.05
    """Largest relative error."""

    def run(self, program: Program) -> None:
        for name, weight in list(program.weights()):
            program.set_weight(name, weight.detach().bfloat16().float())


class Shift(Pass):
    """Behaviour: add a constant times one vector to the input of one block."""

    effect: ClassVar = Effect.BEHAVIOUR
    requires: ClassVar = frozenset({"dense_weights", "causal_lm"})
    looks_for: ClassVar = "the block's up projection"

    layer: int = 0
    """The block."""
    coefficient: float = 1.0
    """Factor of the vector; 0 changes nothing."""
    vector: Path | None = None
    """File with the vector; all ones without it."""

    @pydantic.field_validator("coefficient")
    @classmethod
    def _bounded(cls, value: float) -> float:
        if abs(value) > 100:
            raise ValueError("should be at most 100 in size")
        return value

    def precheck(self, program: Program) -> None:
        if f"up.{self.layer}.weight" not in dict(program.weights()):
            raise InputError(f"key 'layer' of pass 'shift' is {self.layer}", "give 0 or 1")

    def run(self, program: Program) -> list[str]:
        (node,) = [n for n in calls(program, aten.linear.default)
                   if n.meta["module"] == f"up.{self.layer}"]  # fmt: skip
        name = program.add_weight("shift.vector", torch.full((WIDTH,), self.coefficient))
        vector = graphs.insert_weight(program.graph_module, node, name)
        source = node.all_input_nodes[0]
        moved = graphs.insert(node, aten.add.Tensor, (source, vector))
        node.replace_input_with(source, moved)
        return [f"block {self.layer} is shifted by {self.coefficient}"]

    def neutral(self) -> Shift:
        return self.model_copy(update={"coefficient": 0.0})
