"""Asks an ASGI application directly: no sockets, and full control over when a client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec

from fastapi import FastAPI

Parameters = ParamSpec("Parameters")


@dataclass
class Answer:
    """What came back.

    Attributes:
        status: of HTTP; 0: nothing came.
        headers: by lower-case name.
        body: as bytes.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object; every key must be there."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """Of a stream, without the last ``[DONE]``, which must be there unless it failed."""
        lines = [line for line in self.body.decode().split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        values = [line.removeprefix("data: ") for line in lines]
        if values[-1] == "[DONE]":
            values.pop()
        else:
            assert "error" in json.loads(values[-1])
        return [json.loads(value) for value in values]


@dataclass
class Client:
    """Sends requests to an application whose lifespan has begun.

    Attributes:
        app: the application.
        headers: sent with every request.
    """

    app: FastAPI
    headers: dict[str, str] = field(default_factory=dict[str, str])

    async def get(self, path: str, **headers: str) -> Answer:
        """GET a path."""
        return await self.ask("GET", path, b"", headers)

    async def post(self, path: str, body: Any, **headers: str) -> Answer:
        """POST JSON, or bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.ask("POST", path, raw, headers)

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: dict[str, str],
        leave: asyncio.Event | None = None,
        on_part: Callable[[bytes], None] = lambda part: None,
    ) -> Answer:
        """Send one request.

        Args:
            method: of HTTP.
            path: without a query.
            body: as bytes.
            headers: beside those of every request.
            leave: the client goes away when it is set.
            on_part: called with each part of the body.
        """
        every = {"content-type": "application/json", **self.headers, **headers}
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": method,
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "server": ("test", 80), "client": ("test", 1), "http_version": "1.1",
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in every.items()],
        }  # fmt: skip
        answer, leaves = Answer(), leave or asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await leaves.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            elif not leaves.is_set():
                answer.body += message.get("body", b"")
                on_part(message.get("body", b""))

        await self.app(scope, receive, send)
        return answer


@contextlib.asynccontextmanager
async def running(app: FastAPI, **headers: str) -> AsyncGenerator[Client]:
    """A client of an application while its lifespan lasts."""
    async with app.router.lifespan_context(app):
        yield Client(app, headers)


async def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def in_loop(
    test: Callable[Parameters, Coroutine[Any, Any, None]],
) -> Callable[Parameters, None]:
    """Run a test in an event loop of its own."""

    @wraps(test)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run
