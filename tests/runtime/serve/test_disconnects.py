"""Clients that go away: their work stops and their blocks come back."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from tests.runtime.serve._app import app_of, chat, completion, saying, service_of
from tests.runtime.serve._client import Answer, Client, eventually, in_loop, running
from tests.runtime.serve._fake_engine import FakeEngine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


async def ask_and_leave(
    client: Client, path: str, body: dict[str, Any], leave: asyncio.Event, parts: int = 0
) -> Answer:
    """Ask, and go away when told or after some parts of the answer."""
    seen = 0

    def on_part(part: bytes) -> None:
        nonlocal seen
        seen += bool(part)
        if parts and seen >= parts:
            leave.set()

    raw = json.dumps(body).encode()
    return await client.ask("POST", path, raw, {}, leave=leave, on_part=on_part)


def is_empty(engine: FakeEngine) -> bool:
    """Whether it holds nothing and has nothing to do."""
    return not (engine.queue or engine.running) and engine.stats().blocks_used == 0


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("n", [1, 3])
@in_loop
async def test_mid_stream(path: str, n: int) -> None:
    engine = saying("the fox ", seconds=0.005)
    app = app_of(engine)
    make = completion if path == COMPLETIONS else chat
    async with running(app) as client:
        body = make(stream=True, max_tokens=200, n=n)
        answer = await ask_and_leave(client, path, body, asyncio.Event(), parts=3)
        assert answer.status == 200
        await eventually(lambda: engine.counts["cancelled"] == n)
        assert is_empty(engine)
        assert service_of(app).is_idle
        assert all(len(request.tokens) < 100 for request in engine.seen)


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_before_the_first_byte(stream: bool) -> None:
    engine = saying("the fox ", seconds=0.01, max_batch=1)
    app = app_of(engine)
    async with running(app) as client:
        first = asyncio.ensure_future(client.post(COMPLETIONS, completion(max_tokens=40)))
        await eventually(lambda: len(engine.running) == 1)
        leave = asyncio.Event()
        body = completion(stream=stream, max_tokens=200)
        waiting = asyncio.ensure_future(ask_and_leave(client, COMPLETIONS, body, leave))
        await eventually(lambda: len(engine.queue) == 1)
        leave.set()
        await waiting
        await eventually(lambda: not engine.queue)
        assert (await first).json["usage"]["completion_tokens"] == 40
        assert engine.counts["cancelled"] == 1


@in_loop
async def test_while_the_body_is_sent() -> None:
    app = app_of(saying("x"))
    messages = [{"type": "http.request", "body": b'{"mod', "more_body": True},
                {"type": "http.disconnect"}]  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": [],
             "query_string": b"", "root_path": "", "scheme": "http"}  # fmt: skip
    async with running(app) as client:
        await app(scope, receive, send)
        assert service_of(app).is_idle
        assert (await client.get("/health")).status == 200
    assert all(message.get("status") != 500 for message in sent)


@in_loop
async def test_no_block_is_lost_in_a_thousand_operations() -> None:
    """Requests of all kinds, of which half go away somewhere; in the end everything is free."""
    rng = random.Random(5)
    engine = saying("the quick fox ", max_batch=6, blocks_total=40)
    app = app_of(engine, max_queue=8)
    statuses: dict[int, int] = {}

    async def operate(client: Client) -> None:
        fields = {"max_tokens": rng.randint(1, 30), "n": rng.choice([1, 1, 2]),
                  "stream": rng.random() < 0.6}  # fmt: skip
        path, make = rng.choice([(COMPLETIONS, completion), (CHAT, chat)])
        leave, kind = asyncio.Event(), rng.random()
        parts = rng.randint(1, 6) if kind < 0.3 else 0
        task = asyncio.ensure_future(ask_and_leave(client, path, make(**fields), leave, parts))
        if kind > 0.8:
            await asyncio.sleep(rng.random() * 0.01)
            leave.set()
        status = (await task).status
        statuses[status] = statuses.get(status, 0) + 1

    async with running(app) as client:

        async def user() -> None:
            for _ in range(50):
                await operate(client)

        await asyncio.gather(*(user() for _ in range(20)))
        await eventually(lambda: is_empty(engine))
        assert service_of(app).is_idle
        assert service_of(app).worker.open_streams == frozenset()
    assert sum(statuses.values()) == 1000
    assert set(statuses) <= {0, 200, 429, 499}
    assert statuses[200] > 200
    assert engine.counts["cancelled"] > 50
    assert engine.counts["finished"] == len(engine.seen)
