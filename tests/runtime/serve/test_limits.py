"""Back-pressure, timeouts and draining."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from tests.runtime.serve._app import app_of, chat, completion, saying, service_of
from tests.runtime.serve._client import Answer, Client, eventually, in_loop, running
from tests.runtime.serve._fake_engine import FakeEngine, FakeRequest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Gate:
    """Holds an engine up in its first step until it is opened."""

    def __init__(self) -> None:
        self._opened = threading.Event()

    def __call__(self, running: Any) -> None:
        assert self._opened.wait(10)

    def open(self) -> None:
        """Let the engine go on."""
        self._opened.set()


def held(**options: Any) -> tuple[FakeEngine, Gate]:
    """An engine that gives no tokens until its gate is opened."""
    gate = Gate()
    return saying("the fox ", before_step=gate, **options), gate


def asking(client: Client, count: int, **fields: Any) -> list[asyncio.Task[Answer]]:
    """That many requests at once."""
    bodies = [completion(**fields) for _ in range(count)]
    return [asyncio.ensure_future(client.post(COMPLETIONS, body)) for body in bodies]


@in_loop
async def test_a_full_server_says_when_to_come_back() -> None:
    engine, gate = held(max_batch=2)
    app = app_of(engine, max_queue=1)
    service = service_of(app)
    async with running(app) as client:
        taken = asking(client, 3, max_tokens=20)
        await eventually(lambda: len(service.worker.open_streams) == 3)
        for path, body in ((COMPLETIONS, completion()), (CHAT, chat()), (CHAT, chat(stream=True))):
            refused = await client.post(path, body)
            assert refused.status == 429
            assert (refused.error["type"], refused.error["code"]) == (
                "rate_limit_error", "server_full",
            )  # fmt: skip
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert service.refused == 3
        gate.open()
        assert [answer.status for answer in await asyncio.gather(*taken)] == [200] * 3
        assert (await client.post(COMPLETIONS, completion())).status == 200


@in_loop
async def test_retry_after_follows_the_speed() -> None:
    """20 steps of 0.05 s are left of each of two requests; one has to end: about half of it."""
    engine = saying("the fox ", max_batch=2, seconds=0.05)
    app = app_of(engine, max_queue=0)
    service = service_of(app)
    async with running(app) as client:
        taken = asking(client, 2, max_tokens=60)
        await eventually(lambda: service.throughput.rate > 0 and engine.counts["steps"] > 4)
        refused = await client.post(COMPLETIONS, completion())
        assert 1 <= int(refused.headers["retry-after"]) <= 3
        for task in taken:
            task.cancel()


@in_loop
async def test_many_choices_are_taken_whole_or_not_at_all() -> None:
    engine, gate = held(max_batch=2)
    app = app_of(engine, max_queue=2)
    async with running(app) as client:
        (first,) = asking(client, 1, n=2)
        await eventually(lambda: len(service_of(app).worker.open_streams) == 2)
        refused = await client.post(COMPLETIONS, completion(["a", "b", "c"]))
        assert refused.status == 429
        assert len(engine.seen) <= 2
        never = await client.post(COMPLETIONS, completion(n=5))
        assert (never.status, never.error["param"]) == (400, "n")
        assert "limit of 4" in never.error["message"]
        gate.open()
        assert (await first).status == 200


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_a_request_that_takes_too_long(stream: bool) -> None:
    engine, gate = held()
    app = app_of(engine, request_timeout=0.1)
    async with running(app) as client:
        answer = await client.post(COMPLETIONS, completion(stream=stream))
        assert (answer.status, answer.error["code"]) == (504, "timeout")
        gate.open()
        await eventually(lambda: engine.counts["cancelled"] == 1)
        assert service_of(app).is_idle


@in_loop
async def test_a_stream_that_takes_too_long_ends_with_an_error() -> None:
    engine = saying("the fox ", seconds=0.03)
    async with running(app_of(engine, request_timeout=0.2)) as client:
        answer = await client.post(COMPLETIONS, completion(stream=True, max_tokens=200))
        assert answer.status == 200
        *texts, last = answer.events
        assert texts[0]["choices"][0]["text"]
        assert last["error"]["code"] == "timeout"
        await eventually(lambda: engine.counts["cancelled"] == 1)


@in_loop
async def test_a_body_that_does_not_come() -> None:
    app = app_of(saying("x"), request_timeout=0.05)
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(10)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": [],
             "query_string": b"", "root_path": "", "scheme": "http"}  # fmt: skip
    async with running(app):
        await app(scope, receive, send)
    assert sent[0]["status"] == 408


@in_loop
async def test_a_draining_server_finishes_what_it_has() -> None:
    engine, gate = held()
    app = app_of(engine)
    service = service_of(app)
    async with running(app) as client:
        (first,) = asking(client, 1, stream=True)
        await eventually(lambda: not service.is_idle)
        service.draining = True
        refused = await client.post(COMPLETIONS, completion())
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) == 30
        health = await client.get("/health")
        assert (health.status, health.json) == (503, {"status": "draining"})
        assert (await client.get("/metrics")).status == 200
        gate.open()
        assert (await first).events[-1]["choices"][0]["finish_reason"] == "length"
        assert service.is_idle


@pytest.mark.parametrize("begun", [False, True])
@in_loop
async def test_the_end_of_the_server_ends_its_requests(begun: bool) -> None:
    """Whoever waits gets an answer, not silence."""
    gate = Gate()

    def before_step(running: list[FakeRequest]) -> None:
        if not begun or (len(running) == 4 and all(request.tokens for request in running)):
            gate(running)

    app = app_of(saying("the fox ", before_step=before_step))
    worker = service_of(app).worker
    async with running(app) as client:
        tasks = asking(client, 2, stream=True, max_tokens=200) + asking(client, 2, max_tokens=200)
        await eventually(lambda: len(worker.open_streams) == 4)
        if begun:
            await eventually(lambda: all(stream.received for stream in worker.open_streams))
        worker.end_all()
        gate.open()
        answers = await asyncio.gather(*tasks)
    for answer in answers[:2] if begun else []:
        assert answer.status == 200
        assert "shutting down" in answer.events[-1]["error"]["message"]
    for answer in answers[2:] if begun else answers:
        assert answer.status == 503
        assert "shutting down" in answer.error["message"]
