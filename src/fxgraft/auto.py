"""``backend="auto"``: lower with every backend that works here, keep the fastest that agrees."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from fxgraft.backend import Compiled, find_backend
from fxgraft.errors import Error
from fxgraft.program import Program

_PROMPT, _TOKENS = 16, 9
_CANDIDATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("torch", {"mode": "eager"}),
    ("onnx", {}),
    ("torch", {"mode": "inductor"}),
)


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

    A candidate is refused when it is missing, cannot lower the Program, or does not generate the
    tokens that eager torch generates. Programs that are no language models, or whose weights are
    on the meta device or a GPU, are lowered by torch.
    """
    reference = find_backend("torch").lower(program)
    if program.device.type != "cpu" or "logits" not in program.outputs:
        return reference
    try:
        prompt = program.example(seed=3, batch=1, sequence=_PROMPT)["input_ids"]
        wanted = _decode(reference, prompt)[0]
    except (Error, KeyError):
        return reference
    best, trials, fastest = reference, list[Trial](), float("inf")
    for name, chosen in _CANDIDATES:
        compiled, trial = _try(program, name, chosen, prompt, wanted)
        trials.append(trial)
        if compiled is not None and trial.milliseconds is not None and trial.milliseconds < fastest:
            best, fastest = compiled, trial.milliseconds
    best.trials = trials
    return best


def _try(
    program: Program,
    name: str,
    options: dict[str, Any],
    prompt: torch.Tensor,
    wanted: list[int],
) -> tuple[Compiled | None, Trial]:
    try:
        backend = find_backend(name)
        missing = backend.available()
        if missing is not None:
            return None, Trial(name, options, None, missing)
        compiled = backend.lower(program, **options)
        tokens, milliseconds = _decode(compiled, prompt)
    except Error as error:
        return None, Trial(name, options, None, error.problem)
    if tokens != wanted:
        return None, Trial(name, options, milliseconds, "its tokens differ from eager torch's")
    return compiled, Trial(name, options, milliseconds)


def _decode(compiled: Compiled, prompt: torch.Tensor) -> tuple[list[int], float]:
    """Greedy tokens, and the median time of a decode step after warm-up."""
    times: list[float] = []

    def tick(tokens: torch.Tensor, ended: torch.Tensor) -> bool:
        times.append(time.perf_counter())
        return False

    result = compiled.generate(
        prompt, max_new_tokens=_TOKENS, eos_token_id=[], pad_token_id=0, on_token=tick
    )
    steps = [after - before for before, after in pairwise(times[2:])]
    return result[0, prompt.shape[1] :].tolist(), statistics.median(steps) * 1e3
