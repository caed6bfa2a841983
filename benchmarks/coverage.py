"""How many model families fxgraft captures, and whether what it captures computes the same.

For every causal-LM family of the installed transformers: a tiny random model is captured, its
logits are compared at two batch sizes and lengths (left padding included), and 16 greedy tokens
are compared with transformers' own ``generate``. Models of other kinds: logits or hidden states.

    python benchmarks/coverage.py [--only NAME ...] [--workers N]

Writes ``results/coverage.json`` and ``docs/coverage.md``, the table of what fails, where and why.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import signal
import sys
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

import fxgraft
from fxgraft import results

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
LIMIT_SECONDS = 300
NEW_TOKENS = 16
TOLERANCE = 1e-4
SHAPES = ((2, 12), (3, 21))
STAGES = ("build", "capture", "logits", "tokens", "done")


@dataclass
class Outcome:
    """What happened to one family.

    Attributes:
        name: family.
        stage: the stage that failed, or ``"done"``.
        reason: why, empty if done.
        error: largest relative error of the logits.
        state: ``"state"`` if generation keeps state, ``"recompute"`` with its reason if not.
        seconds: time of everything.
    """

    name: str
    stage: str = "build"
    reason: str = ""
    error: float = 0.0
    state: str = ""
    seconds: float = 0.0


def main() -> None:
    """Run all families, or some."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=None, help="families to run; writes no files")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    names = options.only or all_names()
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers, maxtasksperchild=12) as pool:
        for outcome in pool.imap_unordered(run, names):
            outcomes.append(outcome)
            print(f"{len(outcomes):3}/{len(names)} {line(outcome)}", flush=True)
    outcomes.sort(key=lambda outcome: outcome.name)
    if options.only is None:
        write(outcomes, time.perf_counter() - start)


def all_names() -> list[str]:
    """Causal-LM families, then models of other kinds."""
    import _families as families
    import _other_models as other_models

    return [*families.family_names(), *other_models.MODELS]


def line(outcome: Outcome) -> str:
    """One outcome as text."""
    text = f"{outcome.name:28} {outcome.stage:8} {outcome.seconds:5.1f} s  {outcome.state}"
    return f"{text}  {outcome.reason}".rstrip()


def run(name: str) -> Outcome:
    """Capture and compare one family."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    _quiet()
    outcome = Outcome(name)
    start = time.perf_counter()
    try:
        with time_limit(LIMIT_SECONDS):
            check(name, outcome)
    except Exception as error:
        message = re.sub(r"/\S*/site-packages/", "", " ".join(str(error).split()))
        outcome.reason = message[:300] or type(error).__name__
    outcome.seconds = time.perf_counter() - start
    return outcome


def _quiet() -> None:
    import logging

    from transformers.utils import logging as transformers_logging

    logging.disable(logging.WARNING)
    cast(Any, transformers_logging).set_verbosity_error()


@contextmanager
def time_limit(seconds: int) -> Generator[None]:
    """Raise TimeoutError after ``seconds``."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def check(name: str, outcome: Outcome) -> None:
    """Go through the stages; raises where one fails."""
    import _families as families
    import _other_models as other_models

    if name in other_models.MODELS:
        check_other(other_models.MODELS[name], outcome)
        return
    model = cast(Any, families.tiny_model(name))
    outcome.stage = "capture"
    program = fxgraft.capture(model)
    outcome.stage = "logits"
    for batch, length in SHAPES:
        compare_logits(model, program, batch, length, outcome)
    outcome.stage = "tokens"
    compare_tokens(model, program, outcome)
    outcome.stage = "done"


def example(program: fxgraft.Program, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens; the first row is padded on the left by three."""
    ids = program.example(seed=batch, batch=batch, sequence=length)["input_ids"].clamp(min=3)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :3] = 0
    values = {"input_ids": ids, "attention_mask": mask}
    if any(spec.name == "position_ids" for spec in program.inputs):
        values["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return {spec.name: values[spec.name] for spec in program.inputs}


def compare_logits(
    model: Any, program: fxgraft.Program, batch: int, length: int, outcome: Outcome
) -> None:
    """Compare logits at tokens that are not padding."""
    values = example(program, batch, length)
    with torch.no_grad():
        wanted = model(**values, use_cache=False).logits
        got = program(**values)[program.outputs.index("logits")]
    seen = torch.ones(batch, length, dtype=torch.bool)
    seen[0, :3] = False
    require_close(got[seen], wanted[seen], f"logits at batch {batch}, length {length}", outcome)


def require_close(got: torch.Tensor, wanted: torch.Tensor, what: str, outcome: Outcome) -> None:
    """Raise if the relative error is above the tolerance."""
    scale = wanted.double().abs().max().clamp(min=1e-6)
    error = float((got.double() - wanted.double()).abs().max() / scale)
    outcome.error = max(outcome.error, error)
    if not error <= TOLERANCE:
        raise AssertionError(f"{what} differ by {error:.1e} (relative)")


def compare_tokens(model: Any, program: fxgraft.Program, outcome: Outcome) -> None:
    """Compare greedy tokens of a batch with one padded prompt."""
    values = example(program, 2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = 0
    compiled = fxgraft.compile(program, backend="torch")
    got = compiled.generate(
        values["input_ids"], mask, max_new_tokens=NEW_TOKENS, eos_token_id=[], pad_token_id=0
    )
    outcome.state = "recompute" if compiled.state_problem else "state"
    with torch.no_grad():
        wanted = model.generate(
            input_ids=values["input_ids"], attention_mask=mask, do_sample=False,
            max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, eos_token_id=None,
            pad_token_id=0, use_cache=True,
        )  # fmt: skip
    same = int((got[:, 12:] == wanted[:, 12 : 12 + NEW_TOKENS]).sum())
    if compiled.state_problem:
        outcome.reason = f"keeps no state: {compiled.state_problem}"
    if same != 2 * NEW_TOKENS:
        raise AssertionError(f"{same} of {2 * NEW_TOKENS} greedy tokens equal; {outcome.reason}")


def check_other(build: Any, outcome: Outcome) -> None:
    """Compare the first output of a model that is no causal LM, at two sizes."""
    case = build()
    outcome.stage = "capture"
    program = fxgraft.capture(case.model, case.inputs(2, 12), dynamic=case.dynamic)
    outcome.stage = "logits"
    for batch, length in SHAPES:
        values = case.inputs(batch, length)
        with torch.no_grad():
            wanted = case.model(**values, **case.options)
            got = dict(zip(program.outputs, program(**values), strict=True))
        for name in case.outputs:
            require_close(got[name], wanted[name], f"{name} at batch {batch}", outcome)
    outcome.stage, outcome.state = "done", "no generation"


def write(outcomes: list[Outcome], seconds: float) -> None:
    """Write the result file and the table."""
    import _other_models as other_models

    causal = [outcome for outcome in outcomes if outcome.name not in other_models.MODELS]
    others = [outcome for outcome in outcomes if outcome.name in other_models.MODELS]
    count = len(causal)
    logits = sum(outcome.stage in ("tokens", "done") for outcome in causal)
    tokens = sum(outcome.stage == "done" for outcome in causal)
    with_state = sum(o.stage == "done" and o.state == "state" for o in causal)
    rows = [
        results.row("families with equal logits", logits, f"of {count}", target=145,
                    better="higher", peer=("plain torch.export (captured)", 134)),
        results.row("families with 16 equal greedy tokens", tokens, f"of {count}", target=120,
                    better="higher"),
        results.row("of these, generated with explicit state", with_state, f"of {count}",
                    better="higher"),
        results.row("other kinds of models with equal outputs",
                    sum(outcome.stage == "done" for outcome in others), f"of {len(others)}",
                    target=len(others), better="higher"),
        results.row("time of the whole run", round(seconds), "s"),
    ]  # fmt: skip
    results.write("coverage", "spine", rows, HERE / "results")
    (HERE / "results" / "coverage_families.jsonl").write_text(
        "".join(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)
    )
    (HERE.parent / "docs" / "coverage.md").write_text(page(causal, others))


def page(causal: list[Outcome], others: list[Outcome]) -> str:
    """The table of families as Markdown."""
    import transformers

    failed = [outcome for outcome in causal if outcome.stage != "done"]
    kept = [o for o in causal if o.stage == "done" and o.state != "state"]
    lines = [
        "# Coverage", "",
        f"Tiny random models of every causal-LM family of transformers {transformers.__version__}; "
        "made by `python benchmarks/coverage.py`. Logits: relative error at most "
        f"{TOLERANCE:g} at two batch sizes and lengths. Tokens: {NEW_TOKENS} greedy ones equal to "
        "transformers' own `generate`.", "",
        f"{len(causal) - len(failed)} of {len(causal)} families pass every stage.", "",
        "## What fails", "", "| family | stage | why |", "| --- | --- | --- |",
        *(f"| {o.name} | {o.stage} | {o.reason.replace('|', '/')} |" for o in failed), "",
        "## Equal tokens, but generation recomputes the whole sequence", "",
        "| family | why |", "| --- | --- |",
        *(f"| {o.name} | {o.reason.replace('|', '/')} |" for o in kept), "",
        "## Other kinds of models", "", "| model | result |", "| --- | --- |",
        *(f"| {o.name} | {o.stage} {o.reason} |" for o in others), "",
        "## What passes with explicit state", "",
        ", ".join(o.name for o in causal if o.stage == "done" and o.state == "state"), "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
