"""SEAL in the engine: each request with its own vector and strength, whatever happens to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxgraft
from fxgraft.errors import InputError
from fxgraft.generation.options import SamplingOptions
from fxgraft.runtime.engine import Engine, EngineOptions, Request
from tests import model_folder
from tests.runtime.seal._steered import choosing, fixed

TEXTS = [
    "ask\n<think>\n\nfirst\n\nsecond\n",
    "<think>no break yet",
    "a\n\nb\n\nno tag",
    "<think>a\n\nb</think>c\n\nd\n",
]
CHOICES: list[tuple[str, float]] = [
    ("none", 1.0), ("one", 6.0), ("two", 6.0), ("three", -6.0), ("one", 0.0),
]  # fmt: skip
COUNT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vectors")


@pytest.fixture(scope="module")
def compiled(folder: Path) -> fxgraft.Compiled:
    return choosing(folder)


@pytest.fixture(scope="module")
def expected(folder: Path, compiled: fxgraft.Compiled) -> dict[tuple[str, str, float], list[int]]:
    """What each prompt gets alone from a model with that vector only."""
    found: dict[tuple[str, str, float], list[int]] = {}
    for name, strength in CHOICES:
        alone = fixed(folder, None if name == "none" else name, strength)
        for text in TEXTS:
            tokens = model_folder.tokens_of(folder, text)
            result = alone.generate([tokens], max_new_tokens=COUNT, eos_token_id=[])
            found[text, name, strength] = result[0, len(tokens) :].tolist()
    return found


def engine_of(compiled: fxgraft.Compiled, **options: Any) -> Engine:
    values: dict[str, Any] = {
        "max_batch": 8, "max_context": 64, "memory_bytes": 2**22, "block_size": 4, **options,
    }  # fmt: skip
    return Engine(compiled, EngineOptions(**values))


def submit(engine: Engine, folder: Path, text: str, name: str, strength: float) -> Request:
    return engine.submit(
        model_folder.tokens_of(folder, text),
        SamplingOptions(max_new_tokens=COUNT, eos_token_id=()),
        inputs={"seal_vector": name, "seal_strength": strength},
    )


def run_all(
    engine: Engine, folder: Path, expected: dict[tuple[str, str, float], list[int]]
) -> list[Request]:
    """All prompts with all choices at once; each answer is the one it gets alone."""
    requests = {key: submit(engine, folder, *key) for key in expected}
    while engine.step():
        pass
    assert {key: request.tokens for key, request in requests.items()} == expected
    return list(requests.values())


def test_the_answers_differ(
    folder: Path, expected: dict[tuple[str, str, float], list[int]]
) -> None:
    """The fixture means something: vectors change answers, and breaks are generated."""
    first = {tuple(expected[TEXTS[0], *choice]) for choice in CHOICES}
    assert len(first) == 4
    newline = model_folder.tokens_of(folder, "\n")
    assert expected[TEXTS[0], "none", 1.0][:2] == newline * 2
    assert expected[TEXTS[2], "none", 1.0] == expected[TEXTS[2], "one", 6.0]


@pytest.mark.parametrize("chunk", [3, 512])
def test_many_vectors_in_one_batch(
    compiled: fxgraft.Compiled,
    folder: Path,
    expected: dict[tuple[str, str, float], list[int]],
    chunk: int,
) -> None:
    """Prompts taken in at once or in chunks that cut breaks and tags."""
    run_all(engine_of(compiled, chunk_tokens=chunk), folder, expected)


def test_prefixes_are_shared_by_equal_choices_only(
    compiled: fxgraft.Compiled, folder: Path, expected: dict[tuple[str, str, float], list[int]]
) -> None:
    engine = engine_of(compiled, max_batch=1, chunk_tokens=8, snapshots=64)
    run_all(engine, folder, expected)
    requests = run_all(engine, folder, expected)
    assert all(r.reused_tokens > 0 for r in requests if len(r.prompt) > 8)


def test_preempted_requests_are_steered_again(
    compiled: fxgraft.Compiled, folder: Path, expected: dict[tuple[str, str, float], list[int]]
) -> None:
    engine = engine_of(compiled, max_batch=6, prefix_reuse=False)
    for group in engine.memory.groups:
        # Leaves room for eighteen whole pages.
        while group.can_take(19):
            group.take()
    run_all(engine, folder, expected)
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"seal_vector": "four"}, "'seal_vector' is 'four'.*one of: none, one, two, three"),
        ({"seal_vector": 4}, "whole number from 0 to 3, or one of: none, one"),
        ({"seal_vector": -1}, "whole number from 0 to 3"),
        ({"seal_vector": 0.5}, "whole number from 0 to 3"),
        ({"seal_strength": float("nan")}, "finite number"),
        ({"seal_strength": float("inf")}, "finite number"),
        ({"seal_strength": "much"}, "give a number"),
        ({"seal": 1.0}, "no per-request input 'seal'.*seal_strength, seal_vector"),
    ],
)
def test_wrong_inputs(
    compiled: fxgraft.Compiled, inputs: dict[str, float | str], words: str
) -> None:
    engine = engine_of(compiled)
    with pytest.raises(InputError, match="(?s)" + words):
        engine.submit([1, 2], SamplingOptions(max_new_tokens=1), inputs=inputs)
    assert not engine.step()


def test_one_step_serves_all_choices(compiled: fxgraft.Compiled, folder: Path) -> None:
    """What was prepared for a number of rows is used for any vectors: nothing is captured again."""
    engine = engine_of(compiled, max_batch=4)
    engine.warm_up()
    captured: list[int] = []
    prepare = engine.batch.prepare

    def counted(rows: int) -> Callable[[], torch.Tensor]:
        captured.append(rows)
        return prepare(rows)

    engine.batch.prepare = counted
    for name, strength in CHOICES:
        submit(engine, folder, TEXTS[0], name, strength)
    while engine.step():
        pass
    assert captured == []
