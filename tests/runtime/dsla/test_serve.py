"""The server with the section ``dsla``: levels on the page and in metrics, a log that replays."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from fastapi import FastAPI

import fxgraft
from fxgraft.errors import InputError
from fxgraft.passes.dsla import Dsla
from fxgraft.runtime.dsla_serve import replay
from fxgraft.runtime.serve.options import ServeOptions, read_options
from fxgraft.runtime.serve.startup import app_of
from tests.core._generation import byte_level_tokenizer, tiny_llama
from tests.runtime.serve import _real
from tests.runtime.serve._app import completion
from tests.runtime.serve._client import in_loop, running
from tests.runtime.serve.test_status import values

PRESSED = {
    "high": 1e-9, "low": 1e-9, "calm": 0.0, "hard_ceiling": 1.0, "ceilings": [[0, 1.0]],
}  # fmt: skip


@cache
def compiled() -> fxgraft.Compiled:
    """A tiny Llama of 3 layers, 2 of which can be linear."""
    return fxgraft.compile(tiny_llama(), [Dsla(count=2, live=True)], backend="torch")


def server(log: Path) -> FastAPI:
    options = read_options({"max_batch": 4, "dsla": PRESSED, "dsla_log": str(log)}, {})
    return app_of(compiled(), byte_level_tokenizer(), name="tiny", options=options)


@in_loop
async def check_server(log: Path) -> None:
    async with running(server(log)) as client:
        body = completion(max_tokens=12)
        assert (await client.post("/v1/completions", body)).status == 200
        status = (await client.get("/status.json")).json
        found = values((await client.get("/metrics")).body)
        page = (await client.get("/")).body.decode()
    assert status["policy"]["dsla_offered_layers"] == 2
    assert status["policy"]["dsla_conversions"] == 2
    assert status["policy"]["dsla_start_level"] == 2
    assert found["fxgraft_dsla_conversions"] == {(): 2}
    assert found["fxgraft_dsla_pressure"][()] > 0
    assert 'id="levels"' in page


def test_levels_are_shown_and_decisions_replay(tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    check_server(log)
    pairs = list(replay(log.read_text().splitlines()))
    assert sum(len(before.raised) for before, _ in pairs) == 2
    assert all(before == now for before, now in pairs)


def test_without_the_section_there_is_no_policy() -> None:
    options = ServeOptions.model_validate({"max_batch": 1})
    app = app_of(_real.compiled(), byte_level_tokenizer(), name="tiny", options=options)
    assert app.state.service.worker.stats.policy == {}


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"dsla": {"hihg": 0.9}}, "did you mean 'high'"),
        ({"dsla": {"high": 0.5}}, "calm <= low <= high"),
        ({"dsla": {"ceilings": [[5, 0.1]]}}, "begin at 0 tokens"),
    ],
)
def test_wrong_rules(section: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        read_options(section, {})


def test_a_model_without_live_layers_cannot_be_served_so() -> None:
    options = read_options({"dsla": {}}, {})
    with pytest.raises(InputError, match="live: true"):
        app_of(_real.compiled(), byte_level_tokenizer(), name="tiny", options=options)


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dsla_log"):
        server(tmp_path / "missing" / "decisions.jsonl")
