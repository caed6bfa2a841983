"""Clients that go away: the work for them is cancelled at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")


async def unless_disconnected(http: Request, work: Awaitable[Result]) -> Result:
    """Await some work, or cancel it when the client goes away.

    Args:
        http: the request, its body read.
        work: what is awaited.

    Raises:
        ClientDisconnect: the client went away.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; ends the work behind them however the connection ends.

    Args:
        first: the first events, made already.
        events: the others.
        close: called at the end, whether all was sent or not.
    """

    def __init__(
        self, first: bytes, events: AsyncIterator[bytes], close: Callable[[], None]
    ) -> None:
        self._close = close
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_chain(first, events), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _chain(first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for item in events:
        yield item
