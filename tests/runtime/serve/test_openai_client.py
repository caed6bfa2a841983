"""OpenAI's own Python client, unchanged, over sockets, against the real engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator

import httpx
import openai
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.runtime.serve._app import app_of, saying, service_of
from tests.runtime.serve._client import eventually
from tests.runtime.serve._real import real_app
from tests.runtime.serve._threaded import served

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the quick fox"},
]


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return real_app(keys=("secret",), max_queue=32)


@pytest.fixture(scope="module")
def address(app: FastAPI) -> Generator[str]:
    with served(app) as found:
        yield found


@pytest.fixture
def client(address: str) -> Generator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as made:
        yield made


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "fxgraft"


def test_completions(client: OpenAI) -> None:
    whole = client.completions.create(
        model="tiny", prompt="the quick", max_tokens=8, temperature=0, user="me"
    )
    assert whole.usage is not None
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (8, "length")
    stream = client.completions.create(
        model="tiny", prompt="the quick", max_tokens=8, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_chats(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=6, temperature=0.8, seed=3,
        top_p=0.9, n=2, stop=["\n\n\n"],
    )  # fmt: skip
    assert [choice.message.role for choice in whole.choices] == ["assistant"] * 2
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, temperature=0.8, seed=3, top_p=0.9, n=2,
        stop=["\n\n\n"], stream=True,
    )  # fmt: skip
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_the_stream_helper_accumulates(client: OpenAI) -> None:
    """It wants answers that end by themselves, or with a stop string."""
    whole = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=8, temperature=0
    )
    text = whole.choices[0].message.content or ""
    stop = text[len(text) // 2]
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, max_tokens=8, temperature=0, stop=stop
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    assert final.message.content == text[: text.index(stop)]
    assert final.finish_reason == "stop"


def test_errors_are_the_clients_own(client: OpenAI, address: str) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'") as lost:
        client.completions.create(model="gpt", prompt="a")
    assert lost.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="the context holds 64") as long:
        client.completions.create(model="tiny", prompt="quick " * 100)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="'logprobs'"):
        client.completions.create(model="tiny", prompt="a", logprobs=2)
    with (
        OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError, match="no valid API key"),
    ):
        other.models.list()


def test_the_client_waits_as_long_as_it_is_told() -> None:
    """A full server's 429 with Retry-After becomes a retry that succeeds."""
    app = app_of(saying("the fox ", seconds=0.01, max_batch=1), max_queue=0)

    async def two(address: str) -> None:
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="x", max_retries=3) as client:
            answers = await asyncio.gather(*(
                client.completions.create(model="tiny", prompt="a", max_tokens=30, temperature=0)
                for _ in range(2)
            ))  # fmt: skip
        assert answers[0].choices[0].text == answers[1].choices[0].text

    with served(app) as address:
        asyncio.run(two(address))
    assert service_of(app).refused >= 1


def test_many_at_once(address: str) -> None:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="secret") as client:
            answers = await asyncio.gather(*(
                client.chat.completions.create(
                    model="tiny", messages=MESSAGES, max_tokens=6, temperature=0
                )
                for _ in range(16)
            ))  # fmt: skip
        return [answer.choices[0].message.content or "" for answer in answers]

    assert len(set(asyncio.run(ask()))) == 1


def test_a_closed_stream_gives_its_blocks_back(app: FastAPI, client: OpenAI) -> None:
    worker = service_of(app).worker
    cancelled = worker.stats.cancelled
    stream = client.completions.create(
        model="tiny", prompt="the", max_tokens=60, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    asyncio.run(eventually(lambda: worker.stats.cancelled == cancelled + 1))
    assert worker.stats.blocks_used == 0


def test_a_broken_connection_gives_its_blocks_back(app: FastAPI, address: str) -> None:
    """The client of an answer that does not stream is gone before it is ready."""
    worker = service_of(app).worker
    cancelled = worker.stats.cancelled
    body = {"model": "tiny", "prompt": "the", "max_tokens": 60, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{address}/v1/completions", json=body, timeout=0.05,
            headers={"Authorization": "Bearer secret"},
        )  # fmt: skip
    asyncio.run(eventually(lambda: worker.stats.cancelled == cancelled + 1))
    assert worker.stats.blocks_used == 0


def test_health_while_the_engine_works(address: str) -> None:
    """The engine's thread leaves the event loop its time: a tenth of a second at most."""

    async def ask() -> list[float]:
        times: list[float] = []
        async with (
            AsyncOpenAI(base_url=f"{address}/v1", api_key="secret") as client,
            httpx.AsyncClient() as plain,
        ):
            work = asyncio.gather(*(
                client.completions.create(
                    model="tiny", prompt="the", max_tokens=50, extra_body={"ignore_eos": True}
                )
                for _ in range(8)
            ))  # fmt: skip
            while not work.done():
                start = time.perf_counter()
                assert (await plain.get(f"{address}/health")).json() == {"status": "ok"}
                times.append(time.perf_counter() - start)
                await asyncio.sleep(0.01)
            await work
        return sorted(times)

    times = asyncio.run(ask())
    assert len(times) > 10
    # The bound of the benchmark is 0.1 s; here tests share the processors with others.
    assert times[len(times) // 2] < 0.1
