"""What the server answers to wrong requests: OpenAI's error object, status 4xx, a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fxgraft.errors import InputError
from fxgraft.runtime.serve.keys import VARIABLE, keys_from_environment
from tests.runtime.serve._app import app_of, chat, completion, saying
from tests.runtime.serve._client import in_loop, running

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MALFORMED = [
    b"", b"{", b"null", b"[]", b'"text"', b"{]", b'{"model": "tiny",}', b"\xff\xfe", b"\x00",
    b'{"model": "tiny", "prompt": "\xc3\x28"}', b'{"model": "tiny", "prompt": "\\ud800"}',
    b'{"model": "tiny", "prompt": "a", "temperature": NaN}', b"[" * 100_000,
    b'{"a":' * 100_000, b'{"model": "tiny", "prompt": "a"} {}',
]  # fmt: skip
WRONG_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"max_tokens": True}, "max_tokens", "integer"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"seed": 2**80}, "seed", "less than"),
    ({"stop": ""}, "stop", "should be one of"),
    ({"stop": ["a"] * 17}, "stop", "should be one of"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"usage": True}}, "stream_options.usage", "no such field"),
    ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
    ({"presence_penalty": 1}, "presence_penalty", "not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"min_tokens": 5, "max_tokens": 3}, "", "min_new_tokens=5 is over max_new_tokens=3"),
    ({"inputs": {"strength": "x"}}, "", "give a number"),
    ({"inputs": {"strength": [1.0]}}, "inputs.strength", "one of float, str"),
    ({"inputs": {"colour": 1.0}}, "", "no per-request input"),
]
COMPLETION_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "is empty"),
    ({"prompt": []}, "prompt", "empty list"),
    ({"prompt": ["a", ""]}, "prompt", "1 is empty"),
    ({"prompt": [[]]}, "prompt", "0 is empty"),
    ({"prompt": None}, "prompt", "should be one of"),
    ({"prompt": {"text": "a"}}, "prompt", "should be one of"),
    ({"prompt": [1, "a"]}, "prompt", "should be one of"),
    ({"prompt": [10**30]}, "", "outside the vocabulary"),
    ({"prompt": [-1]}, "", "outside the vocabulary"),
    ({"prompt": [100_000]}, "", "outside the vocabulary"),
    ({"prompt": [10**30], "echo": True}, "prompt", "outside the vocabulary"),
    ({"prompt": [-1], "echo": True}, "prompt", "outside the vocabulary"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"best_of": 3}, "best_of", "not supported"),
    ({"logprobs": 3}, "logprobs", "not supported"),
    ({"logprobs": 0}, "logprobs", "not supported"),
]
CHAT_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hi"}, "messages", "array"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role", "should be"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role", "required"),
    ({"messages": [{"role": "tool", "content": "4"}]}, "messages", "no tools here"),
    ({"logprobs": True}, "logprobs", "not supported"),
    ({"top_logprobs": 2}, "top_logprobs", "not supported"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"tool_choice": "required"}, "tool_choice", "should be"),
    ({"response_format": {"type": "json_object"}}, "response_format.type", "should be"),
    ({"modalities": ["audio"]}, "modalities.0", "should be"),
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@in_loop
async def test_malformed_json(path: str) -> None:
    async with running(app_of(saying("x"))) as client:
        for body in MALFORMED:
            answer = await client.post(path, body)
            assert answer.status == 400, body[:40]
            assert answer.error["type"] == "invalid_request_error"
            assert answer.error["code"] in ("invalid_json", None)


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_wrong_fields_are_named(stream: bool) -> None:
    cases = [(COMPLETIONS, completion, case) for case in WRONG_FIELDS + COMPLETION_FIELDS]
    cases += [(CHAT, chat, case) for case in WRONG_FIELDS + CHAT_FIELDS]
    async with running(app_of(saying("x"))) as client:
        for path, make, (fields, param, words) in cases:
            answer = await client.post(path, {**make(), "stream": stream, **fields})
            assert answer.status == 400, fields
            assert words in answer.error["message"], answer.error
            assert (answer.error["param"] or "") == param


@in_loop
async def test_other_models_routes_and_methods() -> None:
    async with running(app_of(saying("x"))) as client:
        other = await client.post(COMPLETIONS, completion() | {"model": "other"})
        assert (other.status, other.error["code"]) == (404, "model_not_found")
        assert "tiny" in other.error["message"]
        missing = await client.post(COMPLETIONS, {"prompt": "a"})
        assert (missing.status, missing.error["param"]) == (400, "model")
        lost = await client.get("/v1/nothing")
        assert (lost.status, lost.error["type"]) == (404, "not_found_error")
        got = await client.get(COMPLETIONS)
        assert (got.status, got.error["type"]) == (405, "invalid_request_error")
        assert "POST" in got.headers["allow"]


@in_loop
async def test_prompts_that_do_not_fit_the_context() -> None:
    engine = saying("x")
    async with running(app_of(engine)) as client:
        for path, body, name in (
            (COMPLETIONS, completion("quick " * 500), "prompt"),
            (COMPLETIONS, completion([1] * 256), "prompt"),
            (CHAT, chat("quick " * 500), "messages"),
            (COMPLETIONS, completion([1] * 200, max_tokens=57), "max_tokens"),
        ):
            for stream in (False, True):
                answer = await client.post(path, body | {"stream": stream})
                assert answer.status == 400
                assert answer.error["code"] == "context_length_exceeded"
                assert answer.error["param"] == name
                assert "the context holds 256" in answer.error["message"]
        fits = await client.post(COMPLETIONS, completion([1] * 200, max_tokens=56))
        assert fits.json["usage"]["total_tokens"] == 256
    assert len(engine.seen) == 1


@in_loop
async def test_limits_of_the_server() -> None:
    async with running(app_of(saying("x"), max_tokens=8, max_body_bytes=500)) as client:
        long = await client.post(COMPLETIONS, completion(max_tokens=9))
        assert (long.status, long.error["param"]) == (400, "max_tokens")
        assert "limit is 8" in long.error["message"]
        for headers in ({}, {"content-length": "501"}):
            large = await client.ask("POST", COMPLETIONS, b" " * 501, headers)
            assert (large.status, large.error["code"]) == (413, "body_too_large")
        body = json.dumps(completion()).encode()
        assert (await client.post(COMPLETIONS, body + b" " * (500 - len(body)))).status == 200
        # A header that lies about the length does not help.
        lying = await client.ask("POST", COMPLETIONS, b" " * 501, {"content-length": "5"})
        assert lying.status == 413


@in_loop
async def test_a_model_without_a_chat_template() -> None:
    async with running(app_of(saying("x"), template=None)) as client:
        answer = await client.post(CHAT, chat())
    assert (answer.status, answer.error["code"]) == (400, "no_chat_template")
    assert COMPLETIONS in answer.error["message"]


@in_loop
async def test_keys() -> None:
    app = app_of(saying("x"), keys=("secret", "näh"))
    async with running(app) as client:
        for headers in (
            {}, {"authorization": "secret"}, {"authorization": "Basic secret"},
            {"authorization": "Bearer other"}, {"authorization": "Bearer secret2"},
            {"authorization": "Bearer "}, {"authorization": "Bearer näh"},
        ):  # fmt: skip
            for path in ("/v1/models", "/metrics", "/status.json"):
                answer = await client.get(path, **headers)
                assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
                assert answer.error["type"] == "authentication_error"
            assert (await client.post(COMPLETIONS, completion(), **headers)).status == 401
        allowed = {"authorization": "bearer secret"}
        assert (await client.post(COMPLETIONS, completion(), **allowed)).status == 200
        assert (await client.get("/health")).json == {"status": "ok"}
        assert (await client.get("/")).status == 200


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert keys_from_environment() == ()
    monkeypatch.setenv(VARIABLE, " a,b ,")
    assert keys_from_environment() == ("a", "b")
    # A variable that was meant to protect the server and is empty must not open it.
    monkeypatch.setenv(VARIABLE, " , ")
    with pytest.raises(InputError, match=VARIABLE):
        keys_from_environment()
