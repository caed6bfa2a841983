"""``fxgraft serve`` as a process: a model's files in, answers over HTTP out, signals, restarts."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

import fxgraft
from tests.command import command
from tests.model_folder import tokens_of
from tests.runtime.serve._process import ServerProcess, server, tiny_pipeline


def asked(address: str, **fields: Any) -> httpx.Response:
    """Answer to a greedy completion of 5 tokens."""
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 5, "temperature": 0, **fields}
    return httpx.post(f"{address}/v1/completions", json=body, timeout=60)


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Reader(threading.Thread):
    """A client that reads a long stream.

    Attributes:
        lines: what came.
        error: how it ended, if badly.
    """

    def __init__(self, address: str, max_tokens: int) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.error: Exception | None = None
        self._address, self._max_tokens = address, max_tokens

    def run(self) -> None:
        body = {"model": "tiny", "prompt": "abc", "max_tokens": self._max_tokens, "stream": True,
                "ignore_eos": True}  # fmt: skip
        url = f"{self._address}/v1/completions"
        try:
            with httpx.stream("POST", url, json=body, timeout=60) as answer:
                for line in answer.iter_lines():
                    self.lines += [line] if line else []
        except httpx.HTTPError as error:
            self.error = error

    def begin(self) -> Reader:
        """Start, and wait for the first text."""
        self.start()
        until(lambda: bool(self.lines))
        return self


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def running(folder: Path) -> Generator[ServerProcess]:
    pipeline = tiny_pipeline(folder, "max_batch: 4", "served_name: tiny")
    with server(pipeline, FXGRAFT_API_KEYS="one,two") as found:
        yield found


@pytest.mark.slow
def test_openais_client_against_the_command(folder: Path, running: ServerProcess) -> None:
    compiled = fxgraft.compile(folder / "tiny", ["optimize"], backend="torch", check=False)
    prompt = tokens_of(folder / "tiny", "abc")
    expected = compiled.generate([prompt], max_new_tokens=12, eos_token_id=[])[0, len(prompt) :]
    with OpenAI(base_url=f"{running.address}/v1", api_key="two", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        answer = client.completions.create(
            model="tiny",
            prompt="abc",
            max_tokens=12,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=6, stream=True,
            stream_options={"include_usage": True}, seed=1,
        )  # fmt: skip
        *_, last = stream
    assert answer.choices[0].text == _text(folder, expected.tolist())
    assert last.usage is not None
    assert last.usage.completion_tokens <= 6
    assert httpx.get(f"{running.address}/health").json() == {"status": "ok"}
    assert httpx.get(f"{running.address}/metrics").status_code == 401
    assert asked(running.address).status_code == 401
    assert "FXGRAFT_API_KEYS is not set" not in running.messages.read_text()


def _text(folder: Path, tokens: list[int]) -> str:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tiny")  # pyright: ignore[reportUnknownMemberType]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


@pytest.mark.slow
def test_sigterm_drains(folder: Path) -> None:
    """What runs is finished, what comes is refused, the exit code is 0."""
    with server(tiny_pipeline(folder)) as found:
        reader = Reader(found.address, 300).begin()
        found.stop()
        until(lambda: httpx.get(f"{found.address}/health").status_code == 503)
        refused = asked(found.address)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) == 30
        assert found.wait() == 0
        reader.join()
    assert reader.error is None
    assert reader.lines[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in reader.lines[-2]


@pytest.mark.slow
def test_the_grace_period_ends(folder: Path) -> None:
    """What still runs then is told; a second signal does not even wait for that."""
    for period, signals in (("0.3", 1), ("60", 2)):
        with server(tiny_pipeline(folder), "--grace-period", period) as found:
            reader = Reader(found.address, 2000).begin()
            start = time.monotonic()
            for _ in range(signals):
                found.stop(signal.SIGINT)
                time.sleep(0.1)
            assert found.wait() == 0
            assert time.monotonic() - start < 20
            reader.join()
        assert reader.error is None
        assert "shutting down" in reader.lines[-1]


@pytest.mark.slow
def test_kill_and_restart(folder: Path) -> None:
    """After kill -9 in the middle of everything, the same command serves again at once."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with server(tiny_pipeline(folder), "--port", port) as found:
        before = asked(found.address).json()["choices"]
        readers = [Reader(found.address, 2000).begin() for _ in range(3)]
        found.stop(signal.SIGKILL)
        assert found.wait() == -signal.SIGKILL
        for reader in readers:
            reader.join()
            assert isinstance(reader.error, httpx.RemoteProtocolError | httpx.ReadError)
    with server(tiny_pipeline(folder), "--port", port) as found:
        assert found.address.endswith(f":{port}")
        assert asked(found.address).json()["choices"] == before
        assert "FXGRAFT_API_KEYS is not set" in found.messages.read_text()


@pytest.mark.slow
def test_the_default_model(tmp_path: Path) -> None:
    """SmolLM2 answers eight questions at once, and each as if it were alone."""
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        "model: smollm2-135m\npasses: [optimize]\nbackend: torch\nserve: {port: 0, max_batch: 8}\n"
    )
    countries = ["France", "Italy", "Spain", "Japan", "Egypt", "Greece", "Austria", "Portugal"]
    questions = [f"What is the capital of {country}?" for country in countries]

    async def ask(address: str) -> tuple[list[str], str]:
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="any", timeout=300) as client:

            async def answer(question: str) -> str:
                stream = await client.chat.completions.create(
                    model="smollm2-135m", messages=[{"role": "user", "content": question}],
                    max_tokens=12, temperature=0, stream=True,
                )  # fmt: skip
                parts = [chunk async for chunk in stream]
                return "".join(part.choices[0].delta.content or "" for part in parts)

            crowd = await asyncio.gather(*map(answer, questions))
            return crowd, await answer(questions[0])

    with server(file, OMP_NUM_THREADS="2") as found:
        crowd, alone = asyncio.run(ask(found.address))
        found.stop()
        assert found.wait() == 0
    assert "Paris" in alone
    assert crowd[0] == alone
    assert len(set(crowd)) == len(crowd)


def test_wrong_calls_end_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the model is read: exit code 2, and what to do."""
    pipeline = tiny_pipeline(folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command("serve", pipeline, "--port", port) == 2
        assert f"cannot listen on 127.0.0.1 port {port}" in _words(capsys)
    assert command("serve", tiny_pipeline(folder, "prot: 1")) == 2
    assert "did you mean 'port'" in _words(capsys)
    pipeline = tiny_pipeline(folder)
    assert command("serve", pipeline, "--max-batch", "0") == 2
    assert "option --max-batch is 0" in _words(capsys)
    assert command("serve", pipeline, "--backend", "nothing") == 2
    assert "there is no backend 'nothing'" in _words(capsys)
    assert command("serve", folder / "no.yaml") == 2


def test_a_backend_that_cannot_serve(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("serve", tiny_pipeline(folder), "--backend", "onnx") == 1
    assert "compile with backend 'torch'" in _words(capsys)


def _words(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())
