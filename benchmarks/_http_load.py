"""Load on a server with OpenAI's interface: streams, their times, and how fast health answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

_STARTUP, _REQUEST, _POLL = 600.0, 600.0, 0.02


@dataclass
class Stream:
    """One request's answer.

    Attributes:
        text: of the answer.
        tokens: number of new tokens, as the server counts them.
        first: seconds until the first text.
        last: seconds until the end.
    """

    text: str = ""
    tokens: int = 0
    first: float = 0.0
    last: float = 0.0


@dataclass
class Load:
    """What came of several requests.

    Attributes:
        streams: one per prompt.
        seconds: from the first request to the last answer.
        health: seconds of each answer of ``/health`` meanwhile.
    """

    streams: list[Stream]
    seconds: float
    health: list[float] = field(default_factory=list[float])

    @property
    def rate(self) -> float:
        """New tokens per second."""
        return sum(stream.tokens for stream in self.streams) / self.seconds


@contextlib.contextmanager
def server(command: Sequence[str], address: str, log: Path) -> Generator[float]:
    """Run a server; gives the seconds until it was healthy."""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            while not _is_healthy(address):
                if process.poll() is not None or time.perf_counter() - start > _STARTUP:
                    raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield time.perf_counter() - start
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def _is_healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def load(
    address: str, model: str, prompts: Sequence[str], new_tokens: int, *, at_once: bool
) -> Load:
    """Stream a greedy completion of each prompt, all at once or one after the other."""

    async def run() -> Load:
        async with httpx.AsyncClient(timeout=_REQUEST) as client:
            health: list[float] = []
            poller = asyncio.create_task(_poll(address, health))
            start = time.perf_counter()
            works = [_stream(client, address, model, prompt, new_tokens) for prompt in prompts]
            streams = await asyncio.gather(*works) if at_once else [await work for work in works]
            seconds = time.perf_counter() - start
            poller.cancel()
            await asyncio.gather(poller, return_exceptions=True)
            return Load(streams, seconds, health)

    return asyncio.run(run())


async def _stream(
    client: httpx.AsyncClient, address: str, model: str, prompt: str, new_tokens: int
) -> Stream:
    body = {
        "model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    found, start = Stream(), time.perf_counter()
    async with client.stream("POST", f"{address}/v1/completions", json=body) as answer:
        async for event in _events(answer):
            for choice in event.get("choices", []):
                if choice.get("text"):
                    found.first = found.first or time.perf_counter() - start
                    found.text += choice["text"]
            if event.get("usage"):
                found.tokens = event["usage"]["completion_tokens"]
    found.last = time.perf_counter() - start
    return found


async def _events(answer: httpx.Response) -> AsyncGenerator[dict]:  # pyright: ignore[reportMissingTypeArgument, reportUnknownParameterType]
    if answer.status_code != 200:
        raise RuntimeError((await answer.aread()).decode())
    async for line in answer.aiter_lines():
        word = line.removeprefix("data: ").strip()
        if word and word != "[DONE]":
            event = json.loads(word)
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            yield event


async def _poll(address: str, times: list[float]) -> None:
    async with httpx.AsyncClient(timeout=_REQUEST) as client:
        while True:
            start = time.perf_counter()
            (await client.get(f"{address}/health")).raise_for_status()
            times.append(time.perf_counter() - start)
            await asyncio.sleep(_POLL)
