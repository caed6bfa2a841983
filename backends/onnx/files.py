"""The ``.onnx`` files of a model in one folder, and the sessions that run them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fxgraft.backends.onnx.graph_model import GraphModel, translate
from fxgraft.backends.onnx.naming import StateName, state_names
from fxgraft.backends.onnx.options import OnnxOptions
from fxgraft.backends.onnx.session import Session
from fxgraft.backends.onnx.step_model import OnnxStepModel
from fxgraft.backends.onnx.verify import check_model, check_steps
from fxgraft.backends.onnx.weights import WeightFile
from fxgraft.program import Program
from fxgraft.specialise import specialise
from fxgraft.state import StepProgram

MODEL, PREFILL, DECODE = "model.onnx", "prefill.onnx", "decode.onnx"


@dataclass(frozen=True)
class WrittenModel:
    """A whole-sequence model.

    Attributes:
        graph: what was written.
        session: runs it.
        error: largest relative error found when it was checked, None if it was not.
    """

    graph: GraphModel
    session: Session
    error: float | None


@dataclass(frozen=True)
class WrittenSteps:
    """A prefill and a decode graph.

    Attributes:
        prefill: what was written.
        decode: what was written.
        states: names of the states.
        model: runs both.
        error: largest relative error found when they were checked, None if they were not.
    """

    prefill: GraphModel
    decode: GraphModel
    states: tuple[StateName, ...]
    model: OnnxStepModel
    error: float | None


def write_model(
    program: Program, folder: Path, weights: WeightFile, options: OnnxOptions
) -> WrittenModel:
    """Write and check ``model.onnx``.

    Raises:
        LoweringError: a node has no ONNX form, or the result differs from the Program.
        OSError: the folder cannot be written.
    """
    graph = translate(program, options.opset)
    graph.write(folder / MODEL, weights)
    session = Session(folder / MODEL, graph.input_names, graph.output_names, options)
    return WrittenModel(graph, session, check_model(program, session) if options.check else None)


def write_steps(
    program: Program, step: StepProgram, folder: Path, weights: WeightFile, options: OnnxOptions
) -> WrittenSteps:
    """Write and check ``prefill.onnx`` and ``decode.onnx``.

    Raises:
        LoweringError: a node has no ONNX form, or the result differs from the Program.
        OSError: the folder cannot be written.
    """
    states = state_names(step)
    inputs = [*(spec.name for spec in step.own_inputs), *(state.past for state in states)]
    outputs = ["logits", *(state.present for state in states)]
    one_token = specialise(step, {"sequence": 1})
    prefill = translate(step.program, options.opset, inputs=inputs, outputs=outputs)
    decode = translate(one_token, options.opset, inputs=inputs, outputs=outputs, is_decode=True)
    prefill.write(folder / PREFILL, weights)
    decode.write(folder / DECODE, weights)
    # Prefill has many rows per weight and gains little from a second copy of the weights.
    model = OnnxStepModel(
        step,
        Session(folder / PREFILL, inputs, outputs, options, prepack=False),
        Session(folder / DECODE, inputs, outputs, options),
    )
    error = check_steps(program, step, model) if options.check else None
    return WrittenSteps(prefill, decode, tuple(states), model, error)
