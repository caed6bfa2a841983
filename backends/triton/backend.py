"""The Triton backend: options, and the compiled object."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.backend import Backend, Compiled
from fxgraft.backends.triton.cuda_graphs import GraphCapture
from fxgraft.backends.triton.fuse import fused
from fxgraft.backends.triton.step_model import PagedStepModel
from fxgraft.collectives import require_group
from fxgraft.errors import InputError, LoweringError
from fxgraft.generation import StepModel
from fxgraft.kernels.spec import spec_of
from fxgraft.paged_model import RunPages
from fxgraft.paging import PagedProgram, page_state
from fxgraft.placement import move
from fxgraft.program import Program
from fxgraft.report import Report, ReportLine
from fxgraft.state import StepProgram

_KERNELS = {
    "fxgraft.fused_linear": "Triton to 64 rows where it is faster, else cuBLAS",
    "fxgraft.nm_linear": "Triton; many rows: unpacked by Triton, then cuBLAS",
    "fxgraft.paged_attention": "Triton; prompts without a past: torch's attention",
    "fxgraft.rms_norm": "Triton",
    "fxgraft.gated_activation": "Triton",
    "fxgraft.linear_attention": "Triton",
    "fxgraft.linear_attention_slots": "Triton",
    "fxgraft.steer": "Triton",
    "fxgraft.token_automaton_slots": "Triton",
}


class TritonOptions(BaseModel):
    """Options of the Triton backend.

    Attributes:
        device: a CUDA device.
        cuda_graphs: capture decode steps, so that launching them costs nothing.
        block_size: tokens per block of growing state in ``generate``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    device: str = "cuda"
    cuda_graphs: bool = True
    block_size: int = 16


class TritonBackend(Backend):
    """Runs Programs on a GPU with fused kernels."""

    name: ClassVar[str] = "triton"

    def available(self) -> str | None:
        """What is missing on this machine."""
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        return None if torch.cuda.is_available() else "there is no CUDA device"

    def lower(self, program: Program, **options: Any) -> TritonCompiled:
        """See ``Backend.lower``; options are the fields of ``TritonOptions``."""
        chosen = self.check_options(options)
        missing = self.available()
        if missing is not None:
            raise LoweringError(f"backend 'triton' cannot be used: {missing}", "use 'torch'")
        if program.device != torch.device(chosen.device):
            program = program.copy()
            move(program, chosen.device)
        require_group(program)
        return TritonCompiled(program, chosen)

    def check_options(self, options: Mapping[str, Any]) -> TritonOptions:
        """The options as an object; see ``Backend.check_options``."""
        try:
            return TritonOptions(**options)
        except ValidationError as error:
            wrong = error.errors()[0]
            raise InputError(
                f"backend 'triton': option {'.'.join(map(str, wrong['loc']))!r}: {wrong['msg']}",
                f"the options are: {', '.join(TritonOptions.model_fields)}",
            ) from error


BACKEND = TritonBackend()


class TritonCompiled(Compiled):
    """A Program on a GPU."""

    def __init__(self, program: Program, options: TritonOptions) -> None:
        super().__init__(program, "triton", options.model_dump())
        self.chosen = options
        self._capture = GraphCapture()
        self._fused: Counter[str] = Counter()
        self._refused: dict[str, str] = {}

    @torch.no_grad()
    def run(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the whole-sequence graph op by op."""
        return self.program.graph_module(*(value.to(self.program.device) for value in values))

    def lower_step(self, step: StepProgram) -> StepModel:
        """State in pools, one run of blocks per row."""
        paged = page_state(step, block_size=self.chosen.block_size)
        return PagedStepModel(paged, self.lower_pages(paged), self.capture_step)

    def lower_pages(self, paged: PagedProgram) -> RunPages:
        """Fuse what has fused kernels."""
        module, fresh_module = (fused(paged, fresh=fresh) for fresh in (False, True))
        calls = [node for node in module.graph.nodes if node.op == "call_function"]
        self._fused = Counter(graphs.short_target(node) for node in calls)
        self._refused = _refusals(calls)

        def run(values: Sequence[Tensor], *, fresh: bool) -> Tensor:
            return (fresh_module if fresh else module)(*values)[0]

        return run

    def row_bucket(self, rows: int) -> int:
        """1, 2, 4, 8, then multiples of 8, from 64 on multiples of 16."""
        if rows <= 8:
            return 1 << (rows - 1).bit_length()
        unit = 8 if rows <= 64 else 16
        return -(-rows // unit) * unit

    def capture_step(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """In a CUDA graph."""
        return self._capture(step) if self.chosen.cuda_graphs else step

    def describe(self) -> Report:
        """Which kernel runs each kind of node of the decode step."""
        counts = self._fused or Counter(
            graphs.short_target(node)
            for node in self.program.graph.nodes
            if node.op == "call_function"
        )
        ours = {
            graphs.short_target(node)
            for node in self.program.graph.nodes
            if spec_of(node) is not None
        }
        lines = [
            ReportLine(op, count, "PyTorch", self._refused[op])
            if op in self._refused
            else ReportLine(op, count, _KERNELS.get(op, "fxgraft" if op in ours else "ATen"))
            for op, count in counts.most_common()
        ]
        notes = ["decode steps run in CUDA graphs"] if self.chosen.cuda_graphs else []
        if self.state_problem:
            notes = [f"generation recomputes the whole sequence: {self.state_problem}"]
        return Report("triton", lines, notes)


def _refusals(nodes: Iterable[Node]) -> dict[str, str]:
    """Why kernels do not take nodes, by op."""
    return {
        graphs.short_target(node): reason
        for node in nodes
        if (spec := spec_of(node)) and (reason := spec.refusal(node))
    }
