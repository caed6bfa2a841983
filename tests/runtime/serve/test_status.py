"""What the server says of itself: health, metrics, the status page's numbers, and the page."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Receive, Scope, Send

from fxgraft.runtime.serve.metrics import Throughput, quantiles
from tests.core._browser import open_page, tail
from tests.runtime.serve._app import app_of, completion, saying, service_of, tokens_of
from tests.runtime.serve._client import eventually, in_loop, running
from tests.runtime.serve._fake_engine import FakeEngine, FakeRequest
from tests.runtime.serve._threaded import served

COMPLETIONS = "/v1/completions"


def values(text: bytes) -> dict[str, dict[tuple[str, ...], float]]:
    """Samples of a Prometheus text by name, then by values of their labels."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


@in_loop
async def test_metrics() -> None:
    engine = saying("the fox ", seconds=0.002)
    async with running(app_of(engine)) as client:
        for _ in range(2):
            assert (await client.post(COMPLETIONS, completion(max_tokens=5))).status == 200
        assert (await client.post(COMPLETIONS, b"{")).status == 400
        for path in ("/wp-admin", "/.env"):
            assert (await client.get(path)).status == 404
        answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = values(answer.body)
    http = found["fxgraft_http_requests_total"]
    assert http == {(COMPLETIONS, "200"): 2, (COMPLETIONS, "400"): 1, ("other", "404"): 2}
    assert found["fxgraft_requests_total"] == {("length",): 2}
    assert found["fxgraft_generated_tokens_total"] == {(): 10}
    assert found["fxgraft_prompt_tokens_total"] == {(): 2 * len(tokens_of("the quick fox"))}
    assert found["fxgraft_blocks_total"] == {(): 64}
    assert found["fxgraft_running"] == found["fxgraft_blocks_used"] == {(): 0}
    for name in ("time_to_first_token", "time_per_output_token", "request", "queue"):
        assert found[f"fxgraft_{name}_seconds_count"] == {(): 2}, name
    first, each = (
        found[f"fxgraft_{name}_seconds_sum"][()] / 2
        for name in ("time_to_first_token", "time_per_output_token")
    )
    assert 0.002 <= each < first + 0.1
    whole = found["fxgraft_request_seconds_sum"][()] / 2
    assert abs(whole - (first + 4 * each)) < 1e-6


@in_loop
async def test_numbers_of_the_status_page() -> None:
    gate = threading.Event()

    def hold(running: list[FakeRequest]) -> None:
        if running and len(running[0].tokens) == 5:
            assert gate.wait(10)

    engine = saying("the fox ", before_step=hold, max_batch=2)
    app = app_of(engine, max_queue=7)
    async with running(app) as client:
        idle = (await client.get("/status.json")).json
        assert (idle["state"], idle["requests"]["running"], idle["steps"]) == ("ok", 0, 0)
        assert idle["seconds"]["to_first_token"] == {"p50": None, "p99": None}
        assert idle["limits"] == {"max_batch": 2, "max_queue": 7}
        task = asyncio.ensure_future(client.post(COMPLETIONS, completion(n=2, max_tokens=20)))
        worker = service_of(app).worker
        await eventually(lambda: sum(stream.received for stream in worker.open_streams) == 10)
        answer = await client.get("/status.json")
        busy = answer.json
        assert answer.headers["cache-control"] == "no-store"
        assert busy["requests"]["running"] == busy["requests"]["open"] == 2
        assert busy["blocks"]["used"] > 0
        assert busy["tokens"]["generated"] == 10
        kinds = [(layer["kind"], layer["ops"]) for layer in busy["layers"]]
        # The second layer has no op that keeps state.
        used = ("attention", {"attention": 2})
        assert kinds == [used, ("none", {}), used]
        gate.set()
        await task
        done = (await client.get("/status.json")).json
    assert done["requests"]["finished"] == 2
    assert done["seconds"]["to_first_token"]["p99"] > 0
    assert done["tokens"]["per_second"] > 0


def test_tokens_per_second_of_the_last_ten_seconds() -> None:
    now = 0.0
    throughput = Throughput(lambda: now)
    assert throughput.rate == 0
    for now in range(30):  # noqa: B007 - the clock reads it
        throughput.add(8)
    assert throughput.rate == 8
    now = 29 + 60
    assert throughput.rate == 0


def test_quantiles() -> None:
    assert quantiles([]) == {"p50": None, "p99": None}
    assert quantiles([3.0]) == {"p50": 3.0, "p99": 3.0}
    assert quantiles(reversed(range(1, 1001))) == {"p50": 501, "p99": 991}


class Probed:
    """An application whose page ends with a probe."""

    def __init__(self, app: FastAPI, script: str) -> None:
        self._app, self._tail = app, tail(script).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_probe(message: Any) -> None:
            if message["type"] == "http.response.start":
                pairs = [pair for pair in message["headers"] if pair[0] != b"content-length"]
                message = {**message, "headers": pairs}
            elif not message.get("more_body"):
                message = {**message, "body": message.get("body", b"") + self._tail}
            await send(message)

        is_page = scope["type"] == "http" and scope["path"] == "/"
        await self._app(scope, receive, with_probe if is_page else send)


_UNTIL = """
const until = async (condition) => {
  for (let i = 0; i < 100 && !condition(); i++) await new Promise((done) => setTimeout(done, 30));
};
const text = (id) => document.getElementById(id).innerText;
const shown = (id) => document.getElementById(id).offsetParent !== null;
"""
_LOOK = """
await until(() => text("state") === "ok" && shown("main"));
const items = [...document.querySelectorAll("#layers li")];
return {
  state: text("state"), facts: text("facts"), title: document.title, requests: text("requests"),
  memory: text("memory"), rate: Number(text("rate")), tokens: text("tokens"), times: text("times"),
  layers: items.map((item) => item.innerText.replace(/\\s+/g, " ")),
  tones: items.map((item) => item.className),
  line: document.querySelector("#history path").getAttribute("d"),
  used: getComputedStyle(document.querySelector(".bar .used")).width,
  wide: document.documentElement.scrollWidth > innerWidth, login: shown("login"),
};
"""


def slow() -> FakeEngine:
    """An engine whose requests take longer than a browser to start."""
    return saying("the fox ", seconds=0.05, blocks_total=400)


def with_requests(app: FastAPI, look: Callable[[str], dict[str, Any]], script: str) -> Any:
    """Open the page while three requests run."""
    import httpx

    with served(Probed(app, _UNTIL + script)) as address, httpx.Client(timeout=60) as client:
        headers = {"Authorization": "Bearer secret"}
        body = completion(n=3, max_tokens=240, stream=True)
        with client.stream("POST", address + COMPLETIONS, json=body, headers=headers) as stream:
            parts = stream.iter_raw()
            next(parts)
            found = look(address + "/")
            assert next(parts), "the requests still run"
            return found


def test_the_page_in_a_browser() -> None:
    found = with_requests(app_of(slow()), open_page, _LOOK)
    assert found.get("error") is None, found
    assert (found["state"], found["title"], found["login"]) == ("ok", "fxgraft · tiny", False)
    assert "backend none" in found["facts"]
    assert "context 256" in found["facts"]
    assert "running\n3" in found["requests"].replace("\t", "\n")
    assert "of 400" in found["memory"]
    assert float(found["used"].removesuffix("px")) > 0
    assert found["rate"] > 0
    assert found["line"].startswith("M")
    assert found["layers"] == ["layer 0 attention 3", "layer 1 none 0", "layer 2 attention 3"]
    assert found["tones"][0] == found["tones"][2] != found["tones"][1]
    assert "last step" in found["times"]
    assert found["wide"] is False


def test_the_page_asks_for_the_key() -> None:
    script = """
    await until(() => shown("login"));
    const before = { state: text("state"), login: shown("login"), main: shown("main") };
    const [form, key] = [document.getElementById("login"), document.getElementById("key")];
    key.value = "secret";
    form.requestSubmit();
    await until(() => shown("main"));
    return { before, state: text("state"), login: shown("login"), main: shown("main"),
             stored: localStorage.length };
    """
    found = with_requests(app_of(slow(), keys=("secret",)), open_page, script)
    assert found.get("error") is None, found
    assert found["before"] == {"state": "locked", "login": True, "main": False}
    assert (found["state"], found["login"], found["main"]) == ("ok", False, True)
    assert found["stored"] == 0
