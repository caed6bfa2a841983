"""Many requests at once: each gets what it gets alone, whatever the engine does meanwhile."""

from __future__ import annotations

import random

import pytest
import torch

from fxgraft.generation.options import SamplingOptions
from fxgraft.runtime.engine import Request
from fxgraft.runtime.engine.full_chunk import FullChunk
from tests.runtime.engine._models import (
    BLOCK,
    alone,
    answers,
    assert_nothing_held,
    compiled,
    engine_of,
    greedy,
    prompt,
    run,
)

FAMILIES = ["llama", "mistral", "mamba", "jamba"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_crowd_answers_as_each_alone(family: str) -> None:
    engine = engine_of(family)
    lengths = [9, 17, 3, 1, 12, 8, 5]
    requests: list[Request] = []
    for number, length in enumerate(lengths):
        requests.append(engine.submit(prompt(length, number), greedy(4 + number)))
        engine.step()
    run(engine)
    expected = [
        alone(family, prompt(length, number), greedy(4 + number))
        for number, length in enumerate(lengths)
    ]
    assert answers(requests) == expected
    assert {request.finish_reason for request in requests} == {"length"}
    assert_nothing_held(engine)


@pytest.mark.parametrize("family", ["llama", "jamba"])
def test_preempted_requests_go_on_where_they_were(family: str) -> None:
    """Growing state does not fit: the last to come waits, and is computed again."""
    engine = engine_of(family, prefix_reuse=False)
    for group in engine.memory.groups:
        # Leaves room for six whole pages.
        while group.can_take(7):
            group.take()
    requests = [engine.submit(prompt(6, seed), greedy(12)) for seed in range(3)]
    run(engine)
    assert engine.stats().preemptions > 0
    assert requests[0].preemptions == 0
    assert answers(requests) == [alone(family, prompt(6, seed), greedy(12)) for seed in range(3)]


def test_first_come_first_served() -> None:
    engine = engine_of("llama", max_batch=2)
    requests = [engine.submit(prompt(5, seed), greedy(6)) for seed in range(6)]
    ended: list[Request] = []
    while engine.step():
        assert engine.stats().running <= 2
        ended += [r for r in requests if r.is_finished and r not in ended]
    assert ended == requests
    started = [request.started for request in requests]
    assert started == sorted(started, key=lambda moment: moment or 0)


def test_a_long_prompt_does_not_hold_up_others() -> None:
    """Chunks: a running request gets a token in every step while a prompt is taken in."""
    engine = engine_of("llama", chunk_tokens=4, lookahead=False)
    running = engine.submit(prompt(3), greedy(20))
    while not running.tokens:
        engine.step()
    engine.submit(prompt(40, 1), greedy(2))
    for _ in range(8):
        before = len(running.tokens)
        engine.step()
        assert len(running.tokens) == before + 1
        assert engine.stats().prefilling == 1


def test_every_request_has_its_own_options() -> None:
    engine = engine_of("llama", max_batch=8)
    options = [
        greedy(),
        SamplingOptions(max_new_tokens=10, eos_token_id=(), do_sample=True, seed=3),
        SamplingOptions(max_new_tokens=10, eos_token_id=(), do_sample=True, seed=4, top_k=5),
        SamplingOptions(max_new_tokens=10, eos_token_id=(), repetition_penalty=1.5),
        SamplingOptions(max_new_tokens=10, eos_token_id=(), do_sample=True, seed=3),
    ]
    requests = [engine.submit(prompt(7), option) for option in options]
    run(engine)
    assert requests[0].tokens == alone("llama", prompt(7), options[0])
    assert requests[3].tokens == alone("llama", prompt(7), options[3])
    assert requests[1].tokens == requests[4].tokens
    assert len({tuple(request.tokens) for request in requests}) == 4


def test_end_tokens_end_and_are_kept() -> None:
    tokens = alone("llama", prompt(7), greedy())
    ending = SamplingOptions(max_new_tokens=10, eos_token_id=(tokens[4],))
    engine = engine_of("llama")
    request = engine.submit(prompt(7), ending)
    run(engine)
    assert request.tokens == tokens[: tokens.index(tokens[4]) + 1]
    assert request.finish_reason == "eos"
    assert_nothing_held(engine)


def test_tokens_come_as_they_are_chosen() -> None:
    engine = engine_of("llama")
    seen: list[int] = []
    request = engine.submit(prompt(5), greedy(), on_tokens=lambda r, new: seen.extend(new))
    grew: list[int] = []
    while engine.step():
        grew.append(len(seen))
    assert seen == request.tokens
    assert len(set(grew)) > 5


@pytest.mark.parametrize("lookahead", [False, True])
def test_launching_ahead_changes_nothing(lookahead: bool) -> None:
    engine = engine_of("jamba", lookahead=lookahead)
    requests = [engine.submit(prompt(5 + seed, seed), greedy(9)) for seed in range(6)]
    run(engine)
    expected = [alone("jamba", prompt(5 + seed, seed), greedy(9)) for seed in range(6)]
    assert answers(requests) == expected


@pytest.mark.parametrize("family", ["llama", "mistral", "mamba", "jamba"])
def test_a_known_prefix_is_not_computed_again(family: str) -> None:
    engine = engine_of(family)
    shared = prompt(3 * BLOCK, 7)
    first = engine.submit(shared + prompt(3, 1), greedy())
    run(engine)
    second = engine.submit(shared + prompt(6, 2), greedy())
    other = engine.submit(prompt(3 * BLOCK, 8), greedy())
    run(engine)
    assert (first.reused_tokens, other.reused_tokens) == (0, 0)
    assert second.reused_tokens == 3 * BLOCK
    assert second.tokens == alone(family, shared + prompt(6, 2), greedy())
    # The same once more: all but the end of the prompt is known.
    again = engine.submit(shared + prompt(6, 2), greedy())
    run(engine)
    assert again.reused_tokens >= 3 * BLOCK
    assert again.tokens == second.tokens
    assert_nothing_held(engine)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "jamba"])
def test_nothing_is_lost_in_a_thousand_operations(family: str) -> None:
    engine = engine_of(family, memory_bytes=2**18 if family == "llama" else 2**20, max_context=48)
    chance = random.Random(5)
    open_requests: list[Request] = []
    for number in range(1000):
        action = chance.random()
        if action < 0.3 and len(open_requests) < 12:
            tokens = prompt(chance.randint(1, 30), chance.randint(0, 3))
            open_requests.append(engine.submit(tokens, greedy(chance.randint(1, 15))))
        elif action < 0.4 and open_requests:
            engine.cancel(chance.choice(open_requests))
        else:
            engine.step()
        open_requests = [request for request in open_requests if not request.is_finished]
        if number % 50 == 0:
            held = sum(
                int((page.blocks > 0).sum())
                for request in open_requests
                if request.holding is not None
                for page in {p for p in request.holding.pages[0] if p is not None}
            )
            assert engine.memory.groups[0].free <= engine.memory.groups[0].total
            assert engine.stats().blocks_used <= held
    run(engine)
    assert_nothing_held(engine)
    stats = engine.stats()
    assert stats.cancelled > 10
    assert stats.finished > 100


def test_engine_leaves_the_compiled_model_alone() -> None:
    before = compiled("llama").generate([prompt(5)], max_new_tokens=4, eos_token_id=[])
    engine = engine_of("llama")
    engine.submit(prompt(9), greedy())
    run(engine)
    engine.close()
    after = compiled("llama").generate([prompt(5)], max_new_tokens=4, eos_token_id=[])
    assert torch.equal(before, after)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_chunks_are_prepared_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls serve all of them, also of other requests; what is left is computed directly."""
    calls: list[int] = []
    monkeypatch.setattr(FullChunk, "_captured", lambda self, call: calls.append(1) or call)
    engine = engine_of(family, prefix_reuse=False)
    engine.warm_up()
    requests = [engine.submit(prompt(length, length), greedy(4)) for length in (8, 27, 16)]
    run(engine)
    assert answers(requests) == [alone(family, prompt(n, n), greedy(4)) for n in (8, 27, 16)]
    assert len(calls) == (0 if engine.model.paged.needs_mask else 2)


def test_a_chunk_that_cannot_be_captured_is_launched(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of("llama")

    def refuses(step: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine._full_chunk._capture = refuses  # pyright: ignore
    request = engine.submit(prompt(9), greedy(4))
    run(engine)
    assert answers([request]) == [alone("llama", prompt(9), greedy(4))]
    assert "kernel by kernel" in caplog.text
