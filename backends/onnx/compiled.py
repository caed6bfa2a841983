"""A Program that onnxruntime runs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fxgraft.backend import Compiled
from fxgraft.backends.onnx.describe import lines
from fxgraft.backends.onnx.files import WrittenModel, WrittenSteps, write_model, write_steps
from fxgraft.backends.onnx.graph_model import translate
from fxgraft.backends.onnx.options import OnnxOptions
from fxgraft.backends.onnx.session import to_ort, to_torch
from fxgraft.backends.onnx.weights import WeightFile
from fxgraft.errors import LoweringError
from fxgraft.generation import StepModel
from fxgraft.images import language_model
from fxgraft.program import Program
from fxgraft.report import Report
from fxgraft.state import StepProgram


class OnnxCompiled(Compiled):
    """A Program that onnxruntime runs.

    The whole-sequence graph is written when the model is first called, the step graphs when it
    first generates; all share one file of weights in a temporary folder.
    """

    def __init__(self, program: Program, options: OnnxOptions) -> None:
        super().__init__(program, "onnx", options.model_dump())
        threads = options.threads or torch.get_num_threads()
        self._options = options.model_copy(update={"threads": threads})
        self._steps: WrittenSteps | None = None
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="fxgraft-onnx-")
        except OSError as error:
            raise _no_room(error) from error
        self._weights = WeightFile(Path(self._folder.name))

    @cached_property
    def _whole(self) -> WrittenModel:
        try:
            folder = Path(self._folder.name)
            return write_model(self.program, folder, self._weights, self._options)
        except OSError as error:
            raise _no_room(error) from error

    def run(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the whole-sequence graph."""
        return [to_torch(value) for value in self._whole.session.run(list(map(to_ort, values)))]

    def lower_step(self, step: StepProgram) -> StepModel:
        """Prefill and decode in onnxruntime."""
        try:
            folder, program = Path(self._folder.name), language_model(self.program)
            self._steps = write_steps(program, step, folder, self._weights, self._options)
        except OSError as error:
            raise _no_room(error) from error
        return self._steps.model

    @contextlib.contextmanager
    def while_generating(self) -> Generator[None]:
        """Torch only picks tokens; more threads of its own would wait idly in onnxruntime's way."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def describe(self) -> Report:
        """How each kind of node is written in ONNX."""
        graph = translate(self.program, self._options.opset)
        notes = [f"ONNX opset {self._options.opset}, standard operators only"]
        if self.state_problem:
            notes.append(f"generation recomputes the whole sequence: {self.state_problem}")
        elif self._steps is not None:
            notes.append("generation: prefill and decode graphs that share one file of weights")
        return Report("onnx", lines(graph), notes)


def _no_room(error: OSError) -> LoweringError:
    return LoweringError(
        f"the ONNX files cannot be written to the temporary folder: {error}",
        "free some space there, or set TMPDIR to a folder on another disk",
    )
