"""The compiled decode step: specialised to one token, cut by layer, compiled by Inductor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fxgraft import graph as graphs
from fxgraft.backends.torch.decompose import decompose
from fxgraft.backends.torch.regions import RegionRunner
from fxgraft.specialise import specialise
from fxgraft.state import StepProgram


class DecodeRunner:
    """Runs a step graph: compiled for single tokens, eagerly otherwise.

    Each batch size is compiled when it is first met.
    """

    def __init__(self, step: StepProgram) -> None:
        self._step = step
        self._compiled: dict[int, RegionRunner] = {}
        self._position = [spec.name for spec in step.own_inputs].index("input_ids")

    def __call__(self, values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        batch, new = values[self._position].shape
        if new != 1:
            return self._step.program.graph_module(*values)
        if batch not in self._compiled:
            self._compiled[batch] = compile_decode(self._step, batch)
        with torch.inference_mode():
            return self._compiled[batch](values)

    def notes(self) -> list[str]:
        """What was compiled so far."""
        return [
            f"decode at batch {batch}: {len(runner.regions)} regions, "
            f"{runner.distinct} of them distinct and compiled"
            for batch, runner in self._compiled.items()
        ]


def compile_decode(step: StepProgram, batch: int) -> RegionRunner:
    """Compile a step graph for ``batch`` rows of one new token each; the past stays dynamic."""
    program = specialise(step, {"batch": batch, "sequence": 1})
    decompose(program.graph_module)
    graphs.finish(program.graph_module)
    return RegionRunner(program.graph_module, compile_region)


def compile_region(module: GraphModule) -> Callable[..., Any]:
    """Compile one region; its placeholders' values give shapes, symbolic ones included."""
    import torch._inductor as inductor

    examples = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    if not any(node.op == "call_function" for node in module.graph.nodes):
        return copy.copy(module)
    return inductor.standalone_compile(module, examples, dynamic_shapes="from_graph")
