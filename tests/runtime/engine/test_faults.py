"""What goes wrong: the request that it belongs to ends, with an error that says why."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.paged_model import PagedModel, Rows
from tests.runtime.engine._models import (
    alone,
    assert_nothing_held,
    engine_of,
    greedy,
    prompt,
    run,
)


@pytest.mark.parametrize("after", [0, 3])
def test_cancelled_requests_give_everything_back(after: int) -> None:
    engine = engine_of("jamba")
    told: list[int] = []
    stays = engine.submit(prompt(9, 1), greedy())
    leaves = engine.submit(prompt(20), greedy(30), on_tokens=lambda r, new: told.append(len(new)))
    for _ in range(after):
        engine.step()
    engine.cancel(leaves)
    engine.cancel(leaves)
    assert leaves.finish_reason == "cancelled"
    assert told[-1] == 0
    run(engine)
    assert stays.tokens == alone("jamba", prompt(9, 1), greedy())
    assert engine.stats().cancelled == 1
    assert_nothing_held(engine)


def test_nan_ends_the_request_and_names_the_step() -> None:
    engine = engine_of("llama")
    good, bad = (engine.submit(prompt(5, seed), greedy()) for seed in (1, 2))
    model: Any = engine.model

    class Poisoned:
        def __call__(self, rows: Rows) -> Tensor:
            logits = model(rows)
            if bad.row is not None and rows.input_ids.shape[1] == 1 and len(bad.tokens) == 3:
                logits[bad.row, 5] = torch.nan
            return logits

        def decode(self, rows: Rows, chosen: Tensor) -> Tensor:
            return PagedModel.decode(cast(Any, self), rows, chosen)

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

    engine.batch.model = Poisoned()  # pyright: ignore[reportAttributeAccessIssue]
    run(engine)
    assert bad.finish_reason == "error"
    assert bad.error is not None
    assert str(len(bad.tokens) + 1) in str(bad.error)
    assert good.tokens == alone("llama", prompt(5, 1), greedy())
    assert engine.stats().failed == 1
    assert_nothing_held(engine)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("broken")])
def test_a_failed_step_costs_one_request(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("jamba", lookahead=False)
    requests = [engine.submit(prompt(5, seed), greedy()) for seed in range(3)]
    for _ in range(4):
        engine.step()
    launch = engine.batch.launch

    def fails() -> Any:
        monkeypatch.setattr(engine.batch, "launch", launch)
        raise error

    monkeypatch.setattr(engine.batch, "launch", fails)
    run(engine)
    assert [request.finish_reason for request in requests] == ["length", "length", "error"]
    assert requests[2].error is not None
    for seed in range(2):
        assert requests[seed].tokens == alone("jamba", prompt(5, seed), greedy())
    again = engine.submit(prompt(5, 2), greedy())
    run(engine)
    assert again.tokens == alone("jamba", prompt(5, 2), greedy())
    assert_nothing_held(engine)


def test_a_failed_prompt_costs_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("llama")
    compute = engine.prefill._compute  # pyright: ignore[reportPrivateUsage]

    def fails(request: Any, count: int) -> None:
        if len(request.prompt) == 9:
            raise torch.OutOfMemoryError("no memory")
        compute(request, count)

    monkeypatch.setattr(engine.prefill, "_compute", fails)
    bad, good = (engine.submit(prompt(length), greedy()) for length in (9, 6))
    run(engine)
    assert bad.finish_reason == "error"
    assert good.tokens == alone("llama", prompt(6), greedy())
    assert_nothing_held(engine)


@pytest.mark.parametrize(
    ("tokens", "count", "message"),
    [
        ([], 4, "prompt is empty"),
        ([5, 128], 4, "token id 128 is outside the vocabulary of 128"),
        ([-1], 4, "token id -1"),
        (prompt(61), 4, "61 tokens, with max_new_tokens=4 that is over the context of 64"),
    ],
)
def test_impossible_requests_are_refused_at_once(
    tokens: list[int], count: int, message: str
) -> None:
    engine = engine_of("llama")
    with pytest.raises(InputError, match=message):
        engine.submit(tokens, greedy(count))
    with pytest.raises(InputError, match="no per-request input 'mood'"):
        engine.submit([5], greedy(), inputs={"mood": 1.0})
    assert not engine.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_bytes": 1000}, "memory_bytes=1000 is too little"),
        ({"max_context": 4096}, "max_context=4096 is over the model's context"),
    ],
)
def test_impossible_engines_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine_of("llama", **options)


def test_more_requests_than_memory_wait() -> None:
    engine = engine_of("llama", max_batch=64, memory_bytes=2**18, prefix_reuse=False)
    requests = [engine.submit(prompt(8, seed), greedy(20)) for seed in range(30)]
    most = 0
    while engine.step():
        most = max(most, engine.stats().running)
    assert most < 30
    assert [len(request.tokens) for request in requests] == [20] * 30
    assert_nothing_held(engine)
