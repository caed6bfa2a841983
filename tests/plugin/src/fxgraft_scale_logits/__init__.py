"""A third party's pass for fxgraft."""

from __future__ import annotations

from typing import ClassVar

import torch

from fxgraft import graph as graphs
from fxgraft.program import Program
from fxgraft.transform import Effect, Pass


class ScaleLogits(Pass):
    """Multiply the logits by a factor, for example one over a temperature."""

    effect: ClassVar = Effect.BEHAVIOUR
    requires: ClassVar = frozenset({"causal_lm"})
    looks_for: ClassVar = "the output logits"

    factor: float
    """What the logits are multiplied by."""

    def run(self, program: Program) -> list[str]:
        """Insert one multiplication behind the logits."""
        logits = program.output_nodes["logits"]
        scaled = graphs.insert(logits, torch.ops.aten.mul.Tensor, (logits, self.factor), after=True)
        program.graph.output_node().replace_input_with(logits, scaled)
        return [f"logits multiplied by {self.factor}"]

    def neutral(self) -> ScaleLogits:
        """Factor 1."""
        return ScaleLogits(factor=1.0)
