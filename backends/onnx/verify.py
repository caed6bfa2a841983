"""Exported models are run and compared before anyone gets them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxgraft.backends.onnx.session import Session, to_ort, to_torch
from fxgraft.backends.onnx.step_model import OnnxStepModel
from fxgraft.backends.onnx.types import stored_dtype
from fxgraft.check import check_sizes, relative_error
from fxgraft.errors import LoweringError
from fxgraft.program import Program
from fxgraft.state import PROMPT_LENGTH, StepProgram
from fxgraft.stepping import other_inputs

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest relative error of an output, ``max|a - b| / max|b|``, by the model's coarsest dtype.

bfloat16 models are computed in float32 in ONNX, so that theirs is the error of the original.
"""
_STEPS = 3
_LONGEST_WINDOW = 64


def check_model(program: Program, session: Session) -> float:
    """Compare a whole-sequence model with its Program at two sizes.

    Returns:
        The largest relative error.

    Raises:
        LoweringError: an output differs; names it.
    """
    errors: list[float] = []
    for trial in range(2):
        values = program.example(seed=trial + 1, **check_sizes(program, trial))
        if trial:
            _pad_left(program, values)
        inputs = [values[spec.name] for spec in program.inputs]
        with torch.no_grad():
            expected = program.graph_module(*inputs)
        found = [to_torch(value) for value in session.run([to_ort(value) for value in inputs])]
        sizes = " ".join(f"{name}={size}" for name, size in program.sizes(values).items())
        for name, one, other in zip(program.outputs, found, expected, strict=True):
            errors.append(_compare(one, other, f"output {name!r} with {sizes}", program))
    return max(errors)


def _pad_left(program: Program, values: dict[str, Tensor]) -> None:
    for spec in program.inputs:
        if spec.default == "ones" and values[spec.name].shape[-1] > 3:
            values[spec.name][-1, ..., :2] = 0


@dataclass(frozen=True)
class _Trial:
    """Prompts of ``prompt`` tokens, then a chunk of two and three single tokens."""

    batch: int
    prompt: int

    @property
    def cuts(self) -> list[int]:
        """Number of tokens after each step."""
        return [self.prompt, *(self.prompt + 2 + step for step in range(_STEPS + 1))]


def check_steps(program: Program, step: StepProgram, model: OnnxStepModel) -> float:
    """Compare prefill, a chunk and single steps with the whole sequence, left padding included.

    Returns:
        The largest relative error of the logits.

    Raises:
        LoweringError: some step's logits differ; says which.
    """
    windows = [state.limit + 1 for state in step.states if state.limit is not None]
    beyond = max((size for size in windows if size <= _LONGEST_WINDOW), default=4) + 3
    limit = program.dimensions["sequence"].maximum or beyond + 5
    trials = (_Trial(2, min(5, limit - 5)), _Trial(3, min(beyond, limit - 5)))
    return max(_check_trial(program, step, model, trial) for trial in trials)


def _check_trial(program: Program, step: StepProgram, model: OnnxStepModel, trial: _Trial) -> float:
    length = trial.cuts[-1]
    values = program.example(seed=11, batch=trial.batch, sequence=length)
    mask = torch.ones(trial.batch, length, dtype=torch.int64)
    if "attention_mask" in values:
        mask[0, :2] = 0
        values["attention_mask"] = mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if "position_ids" in values:
        values["position_ids"] = positions
    if PROMPT_LENGTH in values:
        values[PROMPT_LENGTH] = torch.full_like(values[PROMPT_LENGTH], trial.prompt)
    with torch.no_grad():
        whole = program.graph_module(*[values[spec.name] for spec in program.inputs])
    logits = whole[program.outputs.index("logits")]
    errors: list[float] = []
    state, start = model.empty_state(trial.batch), 0
    for end in trial.cuts:
        tokens = values["input_ids"][:, start:end]
        inputs = other_inputs(step, values, start, end)
        found, state = model.step(tokens, mask[:, :end], positions[:, start:end], state, inputs)
        where = f"logits of batch {trial.batch} after tokens {start} to {end - 1}"
        errors.append(_compare(found, logits[:, end - 1], where, program))
        start = end
    return max(errors)


def _compare(found: Tensor, expected: Tensor, where: str, program: Program) -> float:
    error = relative_error(found, expected.to(stored_dtype(expected.dtype)))
    if not error <= tolerance(program):
        raise LoweringError(
            f"in onnxruntime the {where} has a relative error of {error:.1e} "
            f"(allowed: {tolerance(program):.0e})",
            "use backend 'torch', or write the model in float32 if it is in half precision, where "
            "rounding can send tokens to other experts",
        )
    return error


def tolerance(program: Program) -> float:
    """The largest relative error that is allowed, by the coarsest element type in use."""
    used = {weight.dtype for _, weight in program.weights()}
    used |= {node.meta["val"].dtype for node in program.output_nodes.values()}
    return max((TOLERANCE.get(dtype, 0.0) for dtype in used), default=1e-4) or 1e-4
