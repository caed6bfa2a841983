"""The server over the real engine: same tokens as ``generate``, faults, and nothing is lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxgraft.paged_model import PagedModel, Rows
from tests.core._generation import byte_level_tokenizer
from tests.runtime.serve._app import chat, completion, service_of, tokens_of
from tests.runtime.serve._client import Client, eventually, in_loop, running
from tests.runtime.serve._real import TOKEN_BYTES, compiled, real_app
from tests.runtime.serve.test_disconnects import ask_and_leave

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPTS = [
    "the quick",
    "brown fox jumps",
    "over",
    "naïve café",
    "日本語",
    "then it stops",
    "🙂 a",
    "x",
]


def generated(prompt: str, count: int) -> str:
    """What ``generate`` answers."""
    ids = tokens_of(prompt)
    result = compiled().generate([ids], max_new_tokens=count, eos_token_id=[])
    tokenizer = byte_level_tokenizer()
    return str(tokenizer.decode(result[0, len(ids) :], skip_special_tokens=True))


def text(answer: Any) -> str:
    """Text of a completion's first choice, streamed or not."""
    assert answer.status == 200, answer
    if answer.headers["content-type"] == "application/json":
        return answer.json["choices"][0]["text"]
    return "".join(event["choices"][0]["text"] for event in answer.events)


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_greedy_answers_are_those_of_generate_alone_and_in_a_crowd(stream: bool) -> None:
    fields = {"max_tokens": 12, "ignore_eos": True, "stream": stream}
    async with running(real_app(max_queue=32)) as client:
        alone = [text(await client.post(COMPLETIONS, completion(p, **fields))) for p in PROMPTS]
        several = [completion(prompt, **fields) for prompt in PROMPTS * 2]
        crowd = await asyncio.gather(*(client.post(COMPLETIONS, body) for body in several))
    assert alone == [generated(prompt, 12) for prompt in PROMPTS]
    assert [text(answer) for answer in crowd] == alone * 2


@in_loop
async def test_seeds_and_choices() -> None:
    body = completion("the fox", n=3, temperature=1.0, seed=5, max_tokens=10, top_p=0.95)
    async with running(real_app()) as client:
        first, again = [(await client.post(COMPLETIONS, body)).json for _ in range(2)]
        other = (await client.post(COMPLETIONS, body | {"seed": 6})).json
        single = (await client.post(COMPLETIONS, body | {"n": 1})).json
    texts = [choice["text"] for choice in first["choices"]]
    assert [choice["text"] for choice in again["choices"]] == texts
    assert [choice["text"] for choice in other["choices"]] != texts
    assert len(set(texts)) == 3
    assert single["choices"][0]["text"] == texts[0]


@in_loop
async def test_stop_strings_cut_the_text() -> None:
    whole = generated("the quick", 30)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    body = completion("the quick", max_tokens=30, stop=stop, ignore_eos=True)
    app = real_app()
    async with running(app) as client:
        for stream in (False, True):
            answer = await client.post(COMPLETIONS, body | {"stream": stream})
            assert text(answer) == whole[: whole.index(stop)]
        await eventually(lambda: service_of(app).is_idle)
    assert service_of(app).worker.stats.generated_tokens < 60


@in_loop
async def test_usage_counts_what_was_reused() -> None:
    prompt = [5] * 33
    async with running(real_app()) as client:
        first, second = [
            (await client.post(COMPLETIONS, completion(prompt, max_tokens=2))).json["usage"]
            for _ in range(2)
        ]
        status = (await client.get("/status.json")).json
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert second["prompt_tokens_details"] == {"cached_tokens": 32}
    assert status["tokens"]["reused"] == 32
    assert status["blocks"]["used"] == 0
    assert status["blocks"]["cached"] > 0


@in_loop
async def test_more_than_the_memory_holds_is_queued() -> None:
    """Memory for little more than one context, and six requests that want most of one each."""
    app = real_app(memory_bytes=TOKEN_BYTES * 16 * 7, max_queue=32)
    async with running(app) as client:
        bodies = [completion([n] * 20, max_tokens=30, ignore_eos=True) for n in range(5, 11)]
        answers = await asyncio.gather(*(client.post(COMPLETIONS, body) for body in bodies))
        assert [answer.json["usage"]["completion_tokens"] for answer in answers] == [30] * 6
        status = (await client.get("/status.json")).json
    assert status["requests"]["finished"] == 6
    assert status["requests"]["preemptions"] > 0
    assert status["blocks"]["used"] == 0


def broken_at(
    monkeypatch: pytest.MonkeyPatch, damage: Callable[[torch.Tensor], torch.Tensor], calls: range
) -> list[int]:
    """Let some decode steps of all engines go wrong; gives the number of steps so far."""
    original, count = PagedModel.__call__, [0]

    def step(self: PagedModel, rows: Rows) -> torch.Tensor:
        logits = original(self, rows)
        if rows.input_ids.shape[1] > 1:
            return logits
        count[0] += 1
        return damage(logits) if count[0] - 1 in calls else logits

    monkeypatch.setattr(PagedModel, "__call__", step)
    return count


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_logits_that_are_not_finite(stream: bool) -> None:
    """The step is named, and the next request is answered as if nothing had been."""
    with pytest.MonkeyPatch.context() as patch:
        broken_at(patch, lambda logits: logits.fill_(float("nan")), range(3, 4))
        app = real_app()
        async with running(app) as client:
            body = completion("the quick", max_tokens=9, stream=stream)
            answer = await client.post(COMPLETIONS, body)
            if stream:
                assert answer.status == 200
                error = answer.events[-1]["error"]
            else:
                assert answer.status == 500
                error = answer.error
            assert "not finite at generation step 4 (new token 5)" in error["message"]
            fine = await client.post(COMPLETIONS, completion("the quick", max_tokens=9))
            assert text(fine) == generated("the quick", 9)
            assert service_of(app).worker.stats.blocks_used == 0


@in_loop
async def test_the_device_runs_out_of_memory() -> None:
    """One request fails and says why; the others, and those after them, get their answers."""

    def out_of_memory(logits: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    with pytest.MonkeyPatch.context() as patch:
        broken_at(patch, out_of_memory, range(6, 7))
        app = real_app()
        async with running(app) as client:
            bodies = [completion(prompt, max_tokens=20) for prompt in PROMPTS[:3]]
            answers = await asyncio.gather(*(client.post(COMPLETIONS, body) for body in bodies))
            failed = [answer for answer in answers if answer.status != 200]
            assert len(failed) == 1
            assert failed[0].status == 500
            assert "out of memory while generating" in failed[0].error["message"]
            assert "lower memory_bytes" in failed[0].error["message"]
            for prompt, answer in zip(PROMPTS, answers, strict=False):
                assert answer in failed or text(answer) == generated(prompt, 20)
            assert (await client.get("/health")).json == {"status": "ok"}
            assert service_of(app).worker.stats.blocks_used == 0


@pytest.mark.slow
@in_loop
async def test_no_block_is_lost_in_a_thousand_operations() -> None:
    """Requests that end, go away, are preempted; in the end every block is free or cached."""
    rng = random.Random(3)
    app = real_app(memory_bytes=TOKEN_BYTES * 16 * 8, max_queue=12)
    worker = service_of(app).worker
    statuses: list[int] = []

    async def operate(client: Client) -> None:
        make, path = rng.choice([(completion, COMPLETIONS), (chat, CHAT)])
        body = make(rng.choice(PROMPTS), max_tokens=rng.randint(1, 12), stream=rng.random() < 0.7)
        leave = asyncio.Event()
        task = asyncio.ensure_future(
            ask_and_leave(client, path, body, leave, parts=rng.choice([0, 0, 1, 3]))
        )
        if rng.random() < 0.2:
            await asyncio.sleep(rng.random() * 0.02)
            leave.set()
        statuses.append((await task).status)

    async with running(app) as client:

        async def user() -> None:
            for _ in range(100):
                await operate(client)

        await asyncio.gather(*(user() for _ in range(10)))
        await eventually(lambda: worker.stats.running + worker.stats.queued == 0)
        await eventually(lambda: worker.stats.blocks_used == 0)
        assert service_of(app).is_idle
    assert len(statuses) == 1000
    assert set(statuses) <= {0, 200, 429, 499}
    assert worker.stats.cancelled > 50
    assert worker.stats.failed == 0
