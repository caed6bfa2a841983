"""The example of replicas: the app of a replica, what Ray is given, and Ray itself."""

from __future__ import annotations

import json
import socket
import sys
import urllib.request
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fxgraft.pipeline import Pipeline
from tests.examples._examples import load, write_chat_model

pytest.importorskip("fastapi")
testclient = pytest.importorskip("fastapi.testclient")
OPTIMIZE = Pipeline.parse(["optimize"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("files") / "model")


def completion(folder: Path, prompt: str = "hello") -> dict[str, Any]:
    return {"model": str(folder), "prompt": prompt, "max_tokens": 5, "temperature": 0}


def options() -> Any:
    from fxgraft.runtime.serve.options import ServeOptions

    return ServeOptions(max_batch=4, memory_bytes=2**20)


def test_the_app_of_a_replica(folder: Path) -> None:
    app = load("ray_serve").build_app(str(folder), OPTIMIZE, options())
    with testclient.TestClient(app) as client:
        assert client.get("/health").json() == {"status": "ok"}
        answer = client.post("/v1/completions", json=completion(folder))
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 5


def test_what_ray_is_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that notes its arguments and builds the app as a replica does."""
    seen: dict[str, Any] = {}

    def ingress(build: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: SimpleNamespace(bind=lambda: build())

    def deployment(**settings: Any) -> Callable[[Any], Any]:
        seen.update(settings)
        return lambda ingress: ingress

    serve = SimpleNamespace(deployment=deployment, ingress=ingress)
    ray = ModuleType("ray")
    ray.serve = serve  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "ray", ray)
    app = load("ray_serve").application(str(folder), OPTIMIZE, 3, options())
    assert seen["num_replicas"] == 3
    assert seen["max_ongoing_requests"] == 8
    assert seen["ray_actor_options"]["num_cpus"] == 1
    with testclient.TestClient(app) as client:
        assert client.post("/v1/completions", json=completion(folder)).status_code == 200


@pytest.fixture
def ray_serve(monkeypatch: pytest.MonkeyPatch) -> Generator[tuple[Any, int]]:
    """Ray on this machine, in processes that find what the tests import."""
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", ":".join(entry for entry in sys.path if entry))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    ray.init(num_cpus=3, include_dashboard=False, configure_logging=False)
    try:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        serve.start(http_options={"port": port})
        yield serve, port
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.slow
def test_replicas_answer_behind_ray(folder: Path, ray_serve: tuple[Any, int]) -> None:
    serve, port = ray_serve
    app = load("ray_serve").application(str(folder), OPTIMIZE, 2, options())
    serve.run(app, name="test", route_prefix="/")
    replicas = serve.status().applications["test"].deployments["fxgraft"].replica_states
    assert {str(getattr(k, "value", k)): v for k, v in replicas.items()} == {"RUNNING": 2}
    url = f"http://127.0.0.1:{port}/v1/completions"
    texts = [_ask(url, completion(folder)) for _ in range(6)]
    assert len(set(texts)) == 1


def _ask(url: str, body: dict[str, Any]) -> str:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["text"]
