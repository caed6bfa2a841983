"""SEAL on a small reasoner whose thoughts are known: redundant paragraphs and accuracy.

python benchmarks/seal_reasoner.py

Trains the reasoner if ``out/seal_reasoner`` does not hold it (8 minutes on one core), extracts a
vector from its own chains, chooses layer and strength on questions that are used for nothing else,
and measures on others, beside three random vectors of the same norm. Everything is greedy.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _seal_reasoner import answer_of, given_answer, prompt_of, question, redundant, train
from _seal_runs import CONTROLS, PLAIN, Answer, answer, engine_with, with_controls

import fxgraft
from fxgraft import results, sources
from fxgraft.passes.seal import Seal, SealCalibration, SteeringVector

HERE = Path(__file__).parent
FOLDER = HERE.parent / "out" / "seal_reasoner"
LAYERS = (1, 2, 3, 4)
STRENGTHS = (0.5, 1.0, 2.0, 4.0)
CAP, TIGHT_CAP = 160, 40
TRACES, CHOOSING, MEASURED = 400, 200, 1000


@dataclass(frozen=True)
class Score:
    """What came of all answers under one condition.

    Attributes:
        accuracy: share of right answers.
        redundant: redundant paragraphs per answer.
        tokens: new tokens per answer.
        capped: share of answers that reached the cap.
        right: for each answer.
    """

    accuracy: float
    redundant: float
    tokens: float
    capped: float
    right: tuple[bool, ...]


def main() -> None:
    """Train, extract, choose, measure, write."""
    torch.set_num_threads(1)
    if not (FOLDER / "training.json").is_file():
        train(FOLDER)
    program, words = fxgraft.capture(str(FOLDER)), sources.tokenizer(FOLDER)
    sets = {name: questions(seed, count) for name, seed, count in (
        ("traces", 101, TRACES), ("choosing", 102, CHOOSING), ("measured", 103, MEASURED),
    )}  # fmt: skip
    calibration = extract(program, words, sets["traces"])
    layer, strength = choose(program, words, sets["choosing"])
    vectors = with_controls(FOLDER / "vectors", SteeringVector.load(FOLDER / "seal", layer))
    steering = Seal(vectors=vectors, layer=layer, after_norm=True, tokenizer=str(FOLDER))
    engine = engine_with(program, steering, max_batch=64, max_context=256)
    conditions = {PLAIN: (PLAIN, 0.0)}
    conditions |= {name: (name, strength) for name in ("seal", *CONTROLS)}
    scores = {
        cap: measure(engine, words, sets["measured"], conditions, cap) for cap in (CAP, TIGHT_CAP)
    }
    write(scores, calibration, layer, strength)


def questions(seed: int, count: int) -> list[list[int]]:
    """Questions of one seed."""
    generator = random.Random(seed)
    return [question(generator) for _ in range(count)]


def encoded(words: Any, digits: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts as token ids."""
    return [words(prompt_of(one))["input_ids"] for one in digits]


def extract(program: fxgraft.Program, words: Any, digits: list[list[int]]) -> dict[str, Any]:
    """Vectors at all layers from the model's own answers."""
    file = FOLDER / "questions.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": prompt_of(one)}) for one in digits))
    stage = SealCalibration(data=(file,), layers=LAYERS, max_new_tokens=CAP, batch_size=16)
    written, made = stage.calibrate(program, FOLDER / "seal")
    print("\n".join(made.summary), flush=True)
    return written.results


def choose(program: fxgraft.Program, words: Any, digits: list[list[int]]) -> tuple[int, float]:
    """The layer and strength with the fewest redundant paragraphs that cost no point."""
    found: list[tuple[float, int, float]] = []
    for layer in LAYERS:
        steering = Seal(
            vectors={"seal": FOLDER / "seal"}, layer=layer, after_norm=True, tokenizer=str(FOLDER)
        )
        engine = engine_with(program, steering, max_batch=64, max_context=256)
        conditions = {PLAIN: (PLAIN, 0.0)} | {str(s): ("seal", s) for s in STRENGTHS}
        scores = measure(engine, words, digits, conditions, CAP)
        for strength in STRENGTHS:
            score = scores[str(strength)]
            print(f"layer {layer}, strength {strength}: {said(score)}", flush=True)
            if score.accuracy >= scores[PLAIN].accuracy - 0.01:
                found.append((score.redundant, layer, strength))
    _, layer, strength = min(found)
    return layer, strength


def measure(
    engine: Any, words: Any, digits: list[list[int]], conditions: Any, cap: int
) -> dict[str, Score]:
    """Scores under each condition."""
    found = answer(engine, encoded(words, digits), conditions, cap)
    return {name: score(words, digits, answers) for name, answers in found.items()}


def score(words: Any, digits: list[list[int]], answers: Sequence[Answer]) -> Score:
    """Grade answers."""
    texts = [words.decode(one.tokens) for one in answers]
    right = tuple(
        given_answer(text) == answer_of(one) for text, one in zip(texts, digits, strict=True)
    )
    return Score(
        accuracy=mean(right),
        redundant=mean(redundant(text)[0] for text in texts),
        tokens=mean(len(one.tokens) for one in answers),
        capped=mean(one.capped for one in answers),
        right=right,
    )


def said(score: Score) -> str:
    """A score in words."""
    return (
        f"accuracy {score.accuracy:.3f}, {score.redundant:.2f} redundant paragraphs, "
        f"{score.tokens:.1f} tokens, capped {score.capped:.3f}"
    )


def write(
    scores: dict[int, dict[str, Score]], calibration: dict[str, Any], layer: int, strength: float
) -> None:
    """Write the figures."""
    plain, seal = scores[CAP][PLAIN], scores[CAP]["seal"]
    controls = [scores[CAP][name] for name in CONTROLS]
    worst = max(abs(1 - one.redundant / plain.redundant) for one in controls)
    finished = [n for n, one in enumerate(scores[TIGHT_CAP][PLAIN].right) if one]
    kept = mean(scores[TIGHT_CAP]["seal"].right[n] for n in finished)
    rows = [
        results.row("fewer redundant paragraphs", 100 * (1 - seal.redundant / plain.redundant),
                    "%", target=30.0, better="higher",
                    peer=("largest change by a random vector", 100 * worst)),
        results.row("accuracy lost", 100 * (plain.accuracy - seal.accuracy), "points", target=1.0,
                    peer=("most by a random vector",
                          100 * max(plain.accuracy - one.accuracy for one in controls))),
        results.row("redundant paragraphs per answer, plain", plain.redundant, "paragraphs"),
        results.row("redundant paragraphs per answer, steered", seal.redundant, "paragraphs"),
        results.row("tokens per answer, plain", plain.tokens, "tokens"),
        results.row("tokens per answer, steered", seal.tokens, "tokens"),
        results.row("accuracy, plain", 100 * plain.accuracy, "%", better="higher"),
        results.row("accuracy, steered", 100 * seal.accuracy, "%", better="higher"),
        results.row(f"accuracy under a cap of {TIGHT_CAP} tokens, plain",
                    100 * scores[TIGHT_CAP][PLAIN].accuracy, "%", better="higher"),
        results.row(f"accuracy under a cap of {TIGHT_CAP} tokens, steered",
                    100 * scores[TIGHT_CAP]["seal"].accuracy, "%", better="higher"),
        results.row("of what the plain model answers right under it, steered right", 100 * kept,
                    "%", better="higher"),
    ]  # fmt: skip
    facts = calibration["layers"][str(layer)]
    notes = [
        f"Layer {layer} (4 is after the last norm), strength {strength}, chosen on {CHOOSING} "
        f"other questions; measured on {MEASURED}, greedy, at most {CAP} tokens.",
        f"The vector: {calibration['counts']}, norm {facts['norm']:.3g}, "
        f"{facts['share']:.2f} of a hidden state's, separation {facts['separation']}.",
        *(f"{name}, cap {cap}: {said(one)}"
          for cap, found in scores.items() for name, one in found.items()),
        f"Training: {(FOLDER / 'training.json').read_text()}",
    ]  # fmt: skip
    print("\n".join(notes))
    results.write("seal_reasoner", "seal", rows, HERE / "results", notes=notes)


if __name__ == "__main__":
    main()
