"""Answers with and without steering, many conditions in one batch, for SEAL's benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fxgraft
from fxgraft.generation.options import SamplingOptions
from fxgraft.passes.seal import Seal, SteeringVector, random_like
from fxgraft.runtime.engine import Engine, EngineOptions, Request

PLAIN = "none"
CONTROLS = ("random 1", "random 2", "random 3")


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        tokens: new ones.
        capped: whether it ended because it was as long as it may be.
    """

    tokens: tuple[int, ...]
    capped: bool


def with_controls(folder: Path, vector: SteeringVector) -> dict[str, Path]:
    """Files of a vector, ``"seal"``, and of random ones of the same norm."""
    folder.mkdir(parents=True, exist_ok=True)
    vectors = {"seal": vector}
    vectors |= {name: random_like(vector, seed) for seed, name in enumerate(CONTROLS)}
    return {
        name: one.save(folder / f"{name.replace(' ', '_')}.safetensors")
        for name, one in vectors.items()
    }


def engine_with(
    program: fxgraft.Program, steering: Seal, *, max_batch: int, max_context: int
) -> Engine:
    """An engine over a steered Program; each request says which vector it takes."""
    compiled = fxgraft.compile(program, [steering, "optimize"], backend="torch")
    return Engine(compiled, EngineOptions(max_batch=max_batch, max_context=max_context))


def answer(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    conditions: Mapping[str, tuple[str, float]],
    cap: int,
) -> dict[str, list[Answer]]:
    """Greedy answers to all prompts under all conditions, in one batch.

    Args:
        engine: from ``engine_with``.
        prompts: token ids.
        conditions: name of the vector and strength, by name of the condition.
        cap: most new tokens.
    """
    options = SamplingOptions(max_new_tokens=cap)
    requests: dict[str, list[Request]] = {name: [] for name in conditions}
    for prompt in prompts:
        for name, (vector, strength) in conditions.items():
            inputs = {"seal_vector": vector, "seal_strength": strength}
            requests[name].append(engine.submit(prompt, options, inputs=inputs))
    while engine.step():
        pass
    return {
        name: [Answer(tuple(r.tokens), r.finish_reason == "length") for r in found]
        for name, found in requests.items()
    }
