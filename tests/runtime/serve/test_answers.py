"""What the server answers to requests that are right: OpenAI's schema, text, usage, streams."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fxgraft.generation import SamplingOptions
from tests.runtime.serve._app import app_of, chat, completion, saying, text_of, tokens_of
from tests.runtime.serve._client import Answer, in_loop, running
from tests.runtime.serve._fake_engine import FakeEngine, FakeRequest

TEXT = "the quick naïve café 日本語 🙂 stops here. "
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def streamed(answer: Answer, index: int = 0) -> tuple[str, list[str]]:
    """Text and finish reasons of one choice of a stream of either kind."""
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    choices = [c for e in answer.events for c in e["choices"] if c["index"] == index]
    assert all(len(event["choices"]) <= 1 for event in answer.events)
    texts = [c["text"] if "text" in c else c["delta"].get("content", "") for c in choices]
    return "".join(texts), [c["finish_reason"] for c in choices if c["finish_reason"]]


@in_loop
async def test_a_completion_has_openais_schema() -> None:
    async with running(app_of(saying(TEXT))) as client:
        answer = await client.post(COMPLETIONS, completion(max_tokens=7))
    assert answer.status == 200
    found = Completion.model_validate(answer.json, strict=True)
    assert found.id.startswith("cmpl-")
    assert found.model == "tiny"
    (choice,) = found.choices
    assert choice.text == text_of(tokens_of(TEXT)[:7])
    assert choice.finish_reason == "length"
    assert found.usage is not None
    prompt = len(tokens_of("the quick fox"))
    assert found.usage.prompt_tokens == prompt
    assert found.usage.completion_tokens == 7
    assert found.usage.total_tokens == prompt + 7


@in_loop
async def test_a_chat_goes_through_the_template() -> None:
    engine = saying(TEXT, eos=True)
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": None},
    ]
    async with running(app_of(engine)) as client:
        answer = await client.post(CHAT, chat() | {"messages": messages})
    found = ChatCompletion.model_validate(answer.json, strict=True)
    (choice,) = found.choices
    assert choice.message.content == TEXT
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert found.usage is not None
    assert found.usage.completion_tokens == len(tokens_of(TEXT)) + 1
    assert (
        text_of(engine.seen[0].prompt) == "[system] be brief\n[user] hi\n[assistant] \n[assistant]"
    )


@in_loop
async def test_a_chat_may_use_the_rest_of_the_context() -> None:
    engine = saying("x")
    async with running(app_of(engine, max_tokens=10_000)) as client:
        answer = await client.post(CHAT, chat())
        assert answer.json["usage"]["total_tokens"] == 256
        assert answer.json["choices"][0]["finish_reason"] == "length"
        plain = await client.post(COMPLETIONS, completion())
    assert plain.json["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("stop", [None, "stops", ["é 日", "never", "語"], "🙂 st"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@in_loop
async def test_streams_have_the_text_of_whole_answers(path: str, stop: Any) -> None:
    make = completion if path == COMPLETIONS else chat
    body = make(max_tokens=60, stop=stop)
    async with running(app_of(saying(TEXT))) as client:
        whole = (await client.post(path, body)).json
        answer = await client.post(path, body | {"stream": True})
    choice = whole["choices"][0]
    expected = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    assert streamed(answer) == (expected, [choice["finish_reason"]])
    assert "\ufffd" not in answer.body.decode()
    if stop is None:
        assert choice["finish_reason"] == "length"
        return
    stops = [stop] if isinstance(stop, str) else stop
    assert expected == TEXT[: min(place for s in stops if (place := TEXT.find(s)) >= 0)]
    assert choice["finish_reason"] == "stop"


@in_loop
async def test_a_chat_stream_begins_with_the_role() -> None:
    async with running(app_of(saying(TEXT, eos=True))) as client:
        answer = await client.post(CHAT, chat(stream=True, n=2))
    chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in answer.events]
    assert len({chunk.id for chunk in chunks}) == 1
    for index in (0, 1):
        own = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert all(choice.delta.role is None for choice in own[1:])
        assert streamed(answer, index) == (TEXT, ["stop"])
    assert all("usage" not in event for event in answer.events)


@in_loop
async def test_a_stream_ends_with_usage_where_asked() -> None:
    async with running(app_of(saying(TEXT))) as client:
        body = completion(max_tokens=5, stream=True, stream_options={"include_usage": True})
        events = (await client.post(COMPLETIONS, body)).events
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 5
    assert all(event["choices"][0]["finish_reason"] is None for event in events[:-2])
    # The client's type knows finished choices only, but OpenAI's streams have null before the end.
    parsed = [Completion.construct(**event) for event in events]
    assert {completion.id for completion in parsed} == {events[0]["id"]}
    Completion.model_validate(events[-2], strict=True)


@in_loop
async def test_tokens_come_as_they_are_made() -> None:
    """The first part is there long before the last one."""
    engine = saying(TEXT, seconds=0.02)
    parts: list[bytes] = []
    async with running(app_of(engine)) as client:
        body = b'{"model": "tiny", "prompt": "a", "max_tokens": 10, "stream": true}'
        await client.ask("POST", COMPLETIONS, body, {}, on_part=parts.append)
    assert len([part for part in parts if b"text_completion" in part]) >= 5


@in_loop
async def test_an_end_of_text_that_is_no_special_token_is_no_part_of_the_answer() -> None:
    end = tokens_of("!")[0]
    engine = FakeEngine(answer=lambda request: [*tokens_of("stop"), end], eos=(end,))
    async with running(app_of(engine)) as client:
        choice = (await client.post(COMPLETIONS, completion())).json["choices"][0]
        ignoring = (await client.post(COMPLETIONS, completion(ignore_eos=True))).json["choices"][0]
    assert choice["text"] == "stop"
    assert choice["finish_reason"] == "stop"
    assert ignoring["text"].startswith("stop!stop!")
    assert ignoring["finish_reason"] == "length"


@in_loop
async def test_several_prompts_and_choices() -> None:
    engine = FakeEngine(answer=lambda request: request.prompt, max_batch=3)
    prompts = ["the fox", "quick dog", "jumps"]
    async with running(app_of(engine)) as client:
        for given in (prompts, [tokens_of(prompt) for prompt in prompts]):
            answer = await client.post(COMPLETIONS, completion(given, n=2, max_tokens=1))
            choices = answer.json["choices"]
            assert [choice["index"] for choice in choices] == list(range(6))
            firsts = [text_of(tokens_of(prompt)[:1]) for prompt in prompts]
            assert [c["text"] for c in choices] == [text for text in firsts for _ in range(2)]
            assert answer.json["usage"]["completion_tokens"] == 6
            # A prompt counts once, however many answers it has.
            total = sum(len(tokens_of(prompt)) for prompt in prompts)
            assert answer.json["usage"]["prompt_tokens"] == total


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_echo_puts_the_prompt_in_front(stream: bool) -> None:
    prompts: list[Any] = ["the fox", tokens_of("the fox"), ["the fox"], [tokens_of("the fox")]]
    async with running(app_of(saying("stop"))) as client:
        for prompt in prompts:
            body = completion(prompt, echo=True, max_tokens=1, stream=stream)
            answer = await client.post(COMPLETIONS, body)
            text = streamed(answer)[0] if stream else answer.json["choices"][0]["text"]
            assert text == "the fox" + text_of(tokens_of("stop")[:1])


@in_loop
async def test_fields_become_options_of_generation() -> None:
    engine = saying(TEXT)
    sent = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.2,
        "seed": 5, "max_tokens": 3, "min_tokens": 2, "stop": ["a", "b"], "n": 2,
        "inputs": {"strength": 0.5},
    }  # fmt: skip
    async with running(app_of(engine)) as client:
        assert (await client.post(COMPLETIONS, completion(**sent))).status == 200
        assert (await client.post(COMPLETIONS, completion(seed=-1, top_k=-1))).status == 200
        plain = {"model": "tiny", "prompt": "x"}
        assert (await client.post(COMPLETIONS, plain)).status == 200
    first, second, greedy, default = (request.sampling for request in engine.seen)
    expected = SamplingOptions(
        do_sample=True, temperature=0.7, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.2,
        seed=5, max_new_tokens=3, min_new_tokens=2, stop_strings=("a", "b"),
        eos_token_id=engine.eos,
    )  # fmt: skip
    assert first == expected
    assert second.seed not in (None, 5)
    assert second.model_copy(update={"seed": 5}) == expected
    assert engine.seen[0].inputs == {"strength": 0.5}
    assert (greedy.do_sample, greedy.top_k, greedy.seed) == (False, 0, 2**63 - 1)
    assert (default.do_sample, default.temperature, default.seed) == (True, 1.0, None)


@in_loop
async def test_fields_without_effect_are_accepted() -> None:
    async with running(app_of(saying(TEXT))) as client:
        body = completion(
            user="me", metadata={"a": "b"}, store=False, frequency_penalty=0, presence_penalty=0.0,
            logit_bias={}, best_of=1, suffix=None, logprobs=None, stop=[],
        )  # fmt: skip
        assert (await client.post(COMPLETIONS, body)).status == 200
        body = chat(
            tools=[], tool_choice="none", response_format={"type": "text"}, logprobs=False,
            max_completion_tokens=4, modalities=["text"], service_tier="auto",
        )  # fmt: skip
        answer = await client.post(CHAT, body)
    assert answer.json["usage"]["completion_tokens"] == 4


@in_loop
async def test_models() -> None:
    async with running(app_of(saying(TEXT))) as client:
        (found,) = (await client.get("/v1/models")).json["data"]
        assert Model.model_validate(found, strict=True).id == "tiny"
        assert (await client.get("/v1/models/tiny")).json == found
        missing = await client.get("/v1/models/some/other")
    assert missing.status == 404
    assert missing.error["code"] == "model_not_found"


@in_loop
async def test_the_engine_is_used_in_one_thread_and_closed() -> None:
    engine = saying(TEXT)
    async with running(app_of(engine)) as client:
        assert (await client.post(COMPLETIONS, completion(n=3))).status == 200
        assert not engine.is_closed
    assert engine.is_closed
    assert len(engine.threads) == 1


def test_tokens_of_requests_belong_together() -> None:
    """The double itself: a request's blocks grow with its tokens."""
    request = FakeRequest("", (1,) * 4, SamplingOptions(), None, (), None, {})  # pyright: ignore[reportArgumentType]
    assert request.blocks == 1
    request.tokens.append(1)
    assert request.blocks == 2
