"""Failures of the engine: the request says why, and the server lives as long as it can."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fxgraft.errors import Error
from tests.runtime.serve._app import app_of, chat, completion, saying, service_of
from tests.runtime.serve._client import in_loop, running
from tests.runtime.serve._fake_engine import FakeRequest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def failing_at(step: int, marker: str = "") -> Any:
    """Requests with this many tokens fail, those whose text has a marker only if there is one."""

    def fail(request: FakeRequest) -> Error | None:
        if len(request.tokens) == step and (not marker or request.sampling.seed == 7):
            return Error(f"the logits are not finite at generation step {step}", "check weights")
        return None

    return fail


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_a_request_that_fails_at_once(stream: bool) -> None:
    async with running(app_of(saying("x", fail=failing_at(0)))) as client:
        for path, body in ((COMPLETIONS, completion()), (CHAT, chat())):
            answer = await client.post(path, body | {"stream": stream})
            assert (answer.status, answer.error["type"]) == (500, "server_error")
            assert "generation step 0 (check weights)" in answer.error["message"]


@in_loop
async def test_a_stream_that_fails_later_says_so_and_ends() -> None:
    async with running(app_of(saying("abcdef", fail=failing_at(3)))) as client:
        answer = await client.post(COMPLETIONS, completion(stream=True))
    assert answer.status == 200
    *texts, last = answer.events
    assert len("".join(event["choices"][0]["text"] for event in texts)) >= 1
    assert "step 3" in last["error"]["message"]
    assert b"[DONE]" not in answer.body


@in_loop
async def test_one_choice_that_fails_ends_the_others() -> None:
    engine = saying("abcdef", fail=failing_at(2, "seed 7"))
    app = app_of(engine)
    async with running(app) as client:
        answer = await client.post(COMPLETIONS, completion(seed=7, n=3, max_tokens=200))
        assert answer.status == 500
        fine = await client.post(COMPLETIONS, completion(seed=8, n=3))
        assert fine.status == 200
        assert service_of(app).is_idle
    assert engine.counts["failed"] == 1
    assert engine.counts["cancelled"] == 2


@in_loop
async def test_a_step_that_fails_as_a_whole() -> None:
    """All running requests fail, the next ones succeed."""
    failures = [RuntimeError("the device is gone")]

    def before_step(running: Any) -> None:
        if failures:
            raise failures.pop()

    app = app_of(saying("x", before_step=before_step))
    async with running(app) as client:
        failed = await client.post(COMPLETIONS, completion(n=2))
        assert failed.status == 500
        assert "the device is gone" in failed.error["message"]
        assert (await client.post(COMPLETIONS, completion())).status == 200
        assert (await client.get("/health")).status == 200


@in_loop
async def test_an_engine_that_does_not_recover() -> None:
    """After three steps in a row that failed the server says so, and refuses at once."""

    def before_step(running: Any) -> None:
        raise RuntimeError("broken")

    app = app_of(saying("x", before_step=before_step))
    async with running(app) as client:
        for _ in range(3):
            assert (await client.post(COMPLETIONS, completion())).status == 500
        health = await client.get("/health")
        assert (health.status, health.json["status"]) == (503, "failed")
        refused = await client.post(COMPLETIONS, completion())
        assert refused.status == 503
        assert "broken" in refused.error["message"]
        assert "broken" in (await client.get("/status.json")).json["problem"]


@in_loop
async def test_failures_far_apart_do_not_add_up() -> None:
    steps = [0]

    def before_step(running: Any) -> None:
        steps[0] += 1
        if steps[0] % 3 == 0:
            raise RuntimeError("once in a while")

    async with running(app_of(saying("x", before_step=before_step))) as client:
        statuses = [
            (await client.post(COMPLETIONS, completion(max_tokens=2))).status for _ in range(12)
        ]
        assert (await client.get("/health")).status == 200
    assert statuses.count(500) >= 4
    assert statuses.count(200) >= 4


@in_loop
async def test_an_unexpected_error_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the server is status 500 in OpenAI's form, without the exception's text."""
    app = app_of(saying("x"))

    def broken(*values: Any) -> None:
        raise KeyError("secret of the server")

    monkeypatch.setattr(service_of(app), "_start", broken)
    parts: list[bytes] = []
    body = json.dumps(completion()).encode()
    async with running(app) as client:
        with pytest.raises(KeyError):
            # Starlette sends its answer first, then lets the server log the exception.
            await client.ask("POST", COMPLETIONS, body, {}, on_part=parts.append)
    error = json.loads(b"".join(parts))["error"]
    assert error["type"] == "server_error"
    assert "secret" not in error["message"]
