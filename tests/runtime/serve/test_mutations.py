"""Ten thousand mutated requests: whatever comes, the server does not fail and gives a reason."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections import Counter
from typing import Any

import pytest

from tests.runtime.serve._app import app_of, saying, service_of
from tests.runtime.serve._client import Answer, Client, eventually, in_loop, running

REQUESTS, AT_ONCE = 10_000, 50
SEEDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {
        "model": "tiny", "prompt": "the quick fox", "max_tokens": 4, "temperature": 0.5,
        "top_p": 0.9, "n": 1, "stop": ["a", "b"], "seed": 3, "stream": True, "echo": True,
        "stream_options": {"include_usage": True}, "inputs": {"strength": 1.0}, "user": "me",
        "logit_bias": {}, "min_tokens": 1, "top_k": 4, "repetition_penalty": 1.1,
    }),
    ("/v1/completions", {"model": "tiny", "prompt": [[5, 6], [7]], "max_tokens": 2, "echo": True}),
    ("/v1/chat/completions", {
        "model": "tiny", "max_completion_tokens": 4, "stop": "z", "tools": [],
        "messages": [{"role": "system", "content": "be brief"},
                     {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "response_format": {"type": "text"}, "metadata": {"a": "b"}, "logprobs": False,
    }),
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, -1e-308, 2**31, 2**63, -(2**63), 10**40, "",
    "a", "\x00", "\u202e🙂é", "x" * 3000, "{{ 7 * 7 }}", "%s", "../../etc", [], [[]], [None], {},
    {"a": 1}, {"": {}}, [[1, 2], [3]], [-1], [10**30], ["a", 1], [True], {"type": "text"}, "user",
    {"role": "user", "content": "hi"}, {"role": "tool", "content": None}, "tiny", "stop",
]  # fmt: skip
NAMES = ["x", "", "best_of", "suffix", "logprobs", "n", "top_logprobs"]
BYTES = [b"\x00", b"\xff", b"\\u0000", b"\\ud800", b"NaN", b"1e999", b"{", b"]", b'"', b",", b"\n"]
HEADERS = [
    {}, {"content-type": "text/plain"}, {"content-type": "\xff"}, {"content-length": "-1"},
    {"content-length": "x"}, {"content-length": "9" * 40}, {"authorization": "Bearer \xe9"},
    {"content-encoding": "gzip"}, {"host": "["}, {"accept": "x" * 500},
]  # fmt: skip


def mutated(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """Path, body and headers of a request with some things changed."""
    path, seed = rng.choice(SEEDS)
    body = copy.deepcopy(seed)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        _change(rng, body)
    raw = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        raw = _damage(rng, raw)
    if rng.random() < 0.02:
        path = rng.choice(["/v1", "/v1/completions/", "/v1/models/" + "%00" * 3, "/%2e%2e", "//"])
    return path, raw, rng.choice(HEADERS) if rng.random() < 0.1 else {}


def _change(rng: random.Random, body: Any) -> None:
    """Change something at a random depth."""
    inner = [value for value in _children(body) if isinstance(value, (dict, list)) and value]
    if inner and rng.random() < 0.4:
        _change(rng, rng.choice(inner))
        return
    keys: list[Any] = list(body) if isinstance(body, dict) else list(range(len(body)))
    kind, value = rng.random(), copy.deepcopy(rng.choice(VALUES))
    if kind < 0.15 and keys:
        del body[rng.choice(keys)]
    elif kind < 0.3:
        if isinstance(body, dict):
            body[rng.choice(["x", "", "best_of", "suffix", "logprobs", "n", "top_logprobs"])] = (
                value
            )
        else:
            body.insert(rng.randint(0, len(body)), value)
    elif kind < 0.35 and keys:
        body[rng.choice(keys)] = _nested(rng.randint(1, 60), value)
    elif keys:
        body[rng.choice(keys)] = value


def _children(body: Any) -> list[Any]:
    return list(body.values()) if isinstance(body, dict) else list(body)


def _nested(depth: int, value: Any) -> Any:
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def _damage(rng: random.Random, raw: bytes) -> bytes:
    """Change the bytes of a body without regard to JSON."""
    place = rng.randrange(len(raw))
    kind = rng.random()
    if kind < 0.3:
        return raw[:place]
    if kind < 0.5:
        return raw[:place] + raw[place + 1 :]
    if kind < 0.7:
        return raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1 :]
    return raw[:place] + rng.choice(BYTES) + raw[place:]


def is_right(answer: Answer) -> bool:
    """Whether an answer is a success, or a refusal with OpenAI's error object."""
    if answer.status == 200:
        return True
    return answer.status in (400, 404, 405, 413) and bool(answer.error["message"])


@pytest.mark.slow
@in_loop
async def test_mutated_requests() -> None:
    rng = random.Random(11)
    engine = saying("the quick fox ", max_batch=64)
    app = app_of(engine, max_tokens=8, max_queue=20_000)
    statuses: Counter[int] = Counter()

    async def one(client: Client) -> None:
        path, raw, headers = mutated(rng)
        answer = await client.ask("POST", path, raw, headers)
        assert is_right(answer), (path, raw[:500], headers, answer)
        statuses[answer.status] += 1

    async with running(app) as client:
        for _ in range(REQUESTS // AT_ONCE):
            await asyncio.gather(*(one(client) for _ in range(AT_ONCE)))
        assert (await client.get("/health")).json == {"status": "ok"}
        await eventually(lambda: not engine.running and not engine.queue)
        assert service_of(app).is_idle
    assert statuses.total() == REQUESTS
    # Mutations that are all refused at the door would test nothing behind it.
    assert statuses[200] > REQUESTS / 20
    assert statuses[400] > REQUESTS / 3
