"""The torch backend: options, and the compiled object."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from fxgraft import graph as graphs
from fxgraft.backend import Backend, Compiled
from fxgraft.backends.torch.decode import DecodeRunner
from fxgraft.backends.torch.packed import packed_runner
from fxgraft.collectives import require_group
from fxgraft.errors import InputError, LoweringError
from fxgraft.generation import StepModel
from fxgraft.kernels.spec import spec_of
from fxgraft.paged_model import RunPages
from fxgraft.paging import PagedProgram
from fxgraft.program import Program
from fxgraft.report import Report, ReportLine
from fxgraft.state import StepProgram
from fxgraft.stepping import StateModel


class TorchOptions(BaseModel):
    """Options of the torch backend.

    Attributes:
        mode: ``"eager"`` runs op by op and needs no compiling; ``"inductor"`` compiles the decode
            step (at the first generation with each batch size) and runs prefill eagerly.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    mode: Literal["eager", "inductor"] = "eager"


class TorchBackend(Backend):
    """Runs Programs with torch."""

    name: ClassVar[str] = "torch"

    def available(self) -> str | None:
        """Torch is always there."""
        return None

    def lower(self, program: Program, **options: Any) -> TorchCompiled:
        """See ``Backend.lower``; options are the fields of ``TorchOptions``."""
        require_group(program)
        return TorchCompiled(program, self.check_options(options))

    def check_options(self, options: Mapping[str, Any]) -> TorchOptions:
        """The options as an object; see ``Backend.check_options``."""
        try:
            chosen = TorchOptions(**options)
        except ValidationError as error:
            wrong = error.errors()[0]
            raise InputError(
                f"backend 'torch': option {'.'.join(map(str, wrong['loc']))!r}: {wrong['msg']}",
                f"the options are: {', '.join(TorchOptions.model_fields)}",
            ) from error
        if chosen.mode == "inductor" and (problem := inductor_problem()):
            raise LoweringError(f"mode 'inductor' cannot be used: {problem}", "use mode 'eager'")
        return chosen


BACKEND = TorchBackend()


def inductor_problem() -> str | None:
    """What keeps Inductor from compiling on this machine, or None."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if not any(name and shutil.which(name) for name in compilers):
        return "no C++ compiler is installed"
    return None


class TorchCompiled(Compiled):
    """A Program that torch runs."""

    def __init__(self, program: Program, options: TorchOptions) -> None:
        super().__init__(program, "torch", options.model_dump())
        self.mode = options.mode
        self._decode: DecodeRunner | None = None

    @torch.no_grad()
    def run(self, values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Run the whole-sequence graph op by op."""
        return self.program.graph_module(*values)

    def lower_step(self, step: StepProgram) -> StepModel:
        """Prefill eagerly; decode eagerly or compiled."""
        module = step.program.graph_module
        if self.mode == "eager":
            return StateModel(step, lambda values: module(*values))
        self._decode = DecodeRunner(step)
        return StateModel(step, self._decode)

    def lower_pages(self, paged: PagedProgram) -> RunPages:
        """Op by op; on a CPU with packed weights."""
        return packed_runner(paged.program.copy().graph_module)

    def describe(self) -> Report:
        """Which kernel runs each kind of node."""
        counts = Counter(
            graphs.short_target(node)
            for node in self.program.graph.nodes
            if node.op == "call_function"
        )
        ours = {
            graphs.short_target(node): spec
            for node in self.program.graph.nodes
            if (spec := spec_of(node))
        }
        lines = [
            ReportLine(op, count, *self._runs_on(op, op in ours))
            for op, count in counts.most_common()
        ]
        return Report("torch", lines, self._notes())

    def _runs_on(self, op: str, is_ours: bool) -> tuple[str, str]:
        eager = "fxgraft CPU implementation" if is_ours else "ATen"
        if self.mode == "eager":
            problem = inductor_problem()
            return eager, problem or "mode 'eager' was chosen; 'inductor' compiles the decode step"
        return f"decode: Inductor; prefill: {eager}", ""

    def _notes(self) -> list[str]:
        if self.state_problem:
            return [f"generation recomputes the whole sequence: {self.state_problem}"]
        notes: list[str] = []
        if self._decode:
            notes += self._decode.notes()
        return notes
