"""Writes a folder of ONNX files for plain onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import onnx
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
import torch

from fxgraft import atomic
from fxgraft.backends.onnx import files
from fxgraft.backends.onnx.model_file import Port
from fxgraft.backends.onnx.options import OnnxOptions
from fxgraft.backends.onnx.verify import tolerance
from fxgraft.backends.onnx.weights import FILE as WEIGHTS
from fxgraft.backends.onnx.weights import WeightFile
from fxgraft.errors import StateError
from fxgraft.facts import causal_lm
from fxgraft.program import Program
from fxgraft.state import StepProgram, insert_state
from fxgraft.stepping import ProgramFacts, check_steps
from fxgraft.version import __version__

MANIFEST = "fxgraft.json"
FORMAT = 1
OWNED = frozenset({MANIFEST, WEIGHTS, files.MODEL, files.PREFILL, files.DECODE})
# One protobuf message holds less than 2 GB.
EXTERNAL_BYTES = 1_500_000_000


def export(program: Program, folder: Path, options: OnnxOptions) -> Path:
    """See ``OnnxBackend.export``."""
    step, problem = _step(program)
    with atomic.replaced(folder, MANIFEST, OWNED.__contains__) as temporary:
        facts = _write_steps(program, step, temporary, options) if step else _write_model(
            program, temporary, options)  # fmt: skip
        if problem:
            facts["no_state_because"] = problem
        text = json.dumps({**_common(options), **facts}, indent=2)
        atomic.write_file(temporary / MANIFEST, text + "\n")
    return folder


def _step(program: Program) -> tuple[StepProgram | None, str]:
    """The step graph of a language model; None and why not, if it is one."""
    if not causal_lm(program):
        return None, ""
    try:
        step = insert_state(program)
        check_steps(program, step)
    except StateError as error:
        return None, error.problem
    return step, ""


def _write_model(program: Program, folder: Path, options: OnnxOptions) -> dict[str, Any]:
    is_large = program.count_bytes() > EXTERNAL_BYTES
    written = files.write_model(program, folder, WeightFile(folder if is_large else None), options)
    return {
        "kind": "model",
        "files": {"model": files.MODEL, **({"weights": WEIGHTS} if is_large else {})},
        "inputs": _described(written.graph.inputs),
        "outputs": _described(written.graph.outputs),
        **_checked(program, written.error),
    }


def _write_steps(
    program: Program, step: StepProgram, folder: Path, options: OnnxOptions
) -> dict[str, Any]:
    written = files.write_steps(program, step, folder, WeightFile(folder), options)
    own = len(step.own_inputs)
    facts = cast(Any, ProgramFacts(program))
    return {
        "kind": "language_model",
        "files": {"prefill": files.PREFILL, "decode": files.DECODE, "weights": WEIGHTS},
        "inputs": _described(written.prefill.inputs[:own]),
        "outputs": _described(written.prefill.outputs[:1]),
        "states": [
            {**one, "present": state.present, "grows": state.tensor.grows,
             "limit": state.tensor.limit}
            for one, state in zip(
                _described(written.prefill.inputs[own:]), written.states, strict=True
            )
        ],
        "vocab_size": facts.vocab_size,
        "context_length": facts.context_length,
        "eos_token_ids": list(facts.eos_token_ids),
        "pad_token_id": facts.pad_token_id,
        **_checked(program, written.error),
    }  # fmt: skip


def _described(ports: Sequence[Port]) -> list[dict[str, Any]]:
    return [
        {
            "name": port.value.name,
            "dtype": str(port.value.dtype).removeprefix("torch."),
            "shape": list(port.shape or ()),
        }
        for port in ports
    ]


def _checked(program: Program, error: float | None) -> dict[str, Any]:
    if error is None:
        return {"check": None}
    return {"check": {"max_relative_error": error, "tolerance": tolerance(program)}}


def _common(options: OnnxOptions) -> dict[str, Any]:
    versions = {
        "fxgraft": __version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    return {"format": FORMAT, "opset": options.opset, "versions": versions}
