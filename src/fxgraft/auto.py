"""``backend="auto"``: lower with every backend that works here, keep the fastest that agrees."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxgraft.backend import Compiled, find_backend
from fxgraft.check import relative_error
from fxgraft.collectives import share_of
from fxgraft.errors import Error
from fxgraft.program import Program
from fxgraft.stepping import tolerance

_PROMPT, _TOKENS = 16, 24
# Candidates may add up in another order than eager torch, over all layers.
_ALLOWED = 10.0
_ON_CPU: tuple[tuple[str, dict[str, Any]], ...] = (
    ("onnx", {}),
    ("torch", {"mode": "inductor"}),
)
_ON_GPU: tuple[tuple[str, dict[str, Any]], ...] = (("triton", {}),)


@dataclass(frozen=True)
class Trial:
    """What one candidate did.

    Attributes:
        backend: name of the backend.
        options: its options.
        milliseconds: median time of a decode step, None if it was refused.
        problem: why it was refused, empty if it was not.
    """

    backend: str
    options: dict[str, Any]
    milliseconds: float | None
    problem: str = ""


def lower(program: Program) -> Compiled:
    """Lower with the fastest verified backend; ``compiled.trials`` tells what was tried.

    A candidate is refused when it is missing, cannot lower the Program, or gives other logits than
    eager torch while it takes in the same tokens. Where there is a CUDA device, that is Triton,
    which moves the Program there; else onnx and Inductor. Programs that are no language models, or
    whose weights are on another device, are lowered by torch. So are shares of a model, whose
    processes might else choose differently.
    """
    reference = find_backend("torch").lower(program)
    candidates = _candidates(program)
    if share_of(program) is not None or not candidates or "logits" not in program.outputs:
        return reference
    try:
        prompt = program.example(seed=3, batch=1, sequence=_PROMPT)["input_ids"]
        wanted = _decode(reference, prompt)
    except (Error, KeyError):
        return reference
    best, fastest = reference, wanted.milliseconds
    trials = [Trial("torch", {"mode": "eager"}, wanted.milliseconds)]
    for name, chosen in candidates:
        compiled, trial = _try(program, name, chosen, prompt, wanted)
        trials.append(trial)
        if compiled is not None and trial.milliseconds is not None and trial.milliseconds < fastest:
            best, fastest = compiled, trial.milliseconds
    best.trials = trials
    return best


def _candidates(program: Program) -> Sequence[tuple[str, dict[str, Any]]]:
    """Backends to try, with their options, beside eager torch."""
    kind = program.device.type
    if kind in ("cpu", "cuda") and find_backend("triton").available() is None:
        return _ON_GPU
    return _ON_CPU if kind == "cpu" else ()


@dataclass(frozen=True)
class _Decoded:
    """Some steps of decoding: logits [steps, V], the tokens fed, and the median time of a step."""

    logits: torch.Tensor
    tokens: list[int]
    milliseconds: float


def _try(
    program: Program,
    name: str,
    options: dict[str, Any],
    prompt: torch.Tensor,
    wanted: _Decoded,
) -> tuple[Compiled | None, Trial]:
    try:
        backend = find_backend(name)
        missing = backend.available()
        if missing is not None:
            return None, Trial(name, options, None, missing)
        compiled = backend.lower(program, **options)
        found = _decode(compiled, prompt, wanted.tokens)
    except Error as error:
        return None, Trial(name, options, None, error.problem)
    error = relative_error(found.logits, wanted.logits)
    if not error <= _ALLOWED * tolerance(program):
        problem = f"its logits differ from eager torch's by {error:.1e}"
        return None, Trial(name, options, found.milliseconds, problem)
    return compiled, Trial(name, options, found.milliseconds)


def _decode(compiled: Compiled, prompt: torch.Tensor, tokens: list[int] | None = None) -> _Decoded:
    """Take in the prompt, then ``tokens`` one by one, or greedy ones if there are none given."""
    model, device = compiled.step_model, prompt.device
    mask = torch.ones(1, _PROMPT + _TOKENS, dtype=torch.int64, device=device)
    positions = torch.arange(_PROMPT + _TOKENS, device=device).unsqueeze(0)
    logits: list[torch.Tensor] = []
    fed: list[int] = []
    times: list[float] = []
    with compiled.while_generating():
        new, state, start = prompt, model.empty_state(1), 0
        for index in range(_TOKENS):
            end = _PROMPT + index
            begin = time.perf_counter()
            last, state = model.step(new, mask[:, :end], positions[:, start:end], state)
            # Copied from a GPU, so that its work is waited for.
            last = last[0].cpu()
            times.append(time.perf_counter() - begin)
            logits.append(last.clone())
            fed.append(tokens[index] if tokens else int(last.argmax()))
            new, start = torch.tensor([[fed[-1]]], device=device), end
    # The first step is the prefill, and the second one compiles.
    return _Decoded(torch.stack(logits), fed, statistics.median(times[2:]) * 1e3)
