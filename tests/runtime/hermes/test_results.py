"""What a run leaves: logs, CSV, Parquet, JSON, plots, token times, and traces for Perfetto."""

from __future__ import annotations

import csv
import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fxgraft.errors import InputError
from fxgraft.runtime.hermes import System
from fxgraft.runtime.hermes.results.plots import _time_since  # pyright: ignore[reportPrivateUsage]
from fxgraft.runtime.hermes.results.result import Result

DESCRIPTION: dict[str, Any] = {
    "name": "example",
    "clients": [
        {"kind": "host", "name": "host", "cores": 3,
         "tasks": {"default": {"seconds": 0.2, "law": "exponential"}}},
        {"name": "prefill", "role": "prefill", "kv_bytes": 1e4,
         "cost": {"base": 0.01, "prefill_token": 5e-5}},
        {"name": "decode", "role": "decode", "blocks": 30, "watts": 300.0,
         "cost": {"base": 0.01, "sequence": 1e-3, "prefill_token": 5e-5}},
    ],
    "network": {"inside_node": {"bandwidth": 1e7}, "sharing": True},
    "workloads": [{"name": "chat", "requests": 60, "arrivals": {"rate": 10.0},
                   "prompt": {"kind": "uniform", "low": 1, "high": 90},
                   "output": {"kind": "uniform", "low": 1, "high": 60},
                   "chain": ["preprocess", "prefill", "decode"]}],
    "slo": {"ttft": 0.5, "tpot": 0.05},
}  # fmt: skip


@pytest.fixture(scope="module")
def result() -> Result:
    found = System.parse(DESCRIPTION).simulate()
    assert found.summary["total"]["preemptions"] > 0
    return found


@pytest.fixture(scope="module")
def trace(result: Result, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = result.trace(tmp_path_factory.mktemp("trace") / "new" / "trace.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    assert set(content) == {"displayTimeUnit", "traceEvents"}
    return content["traceEvents"]


# -- the Chrome trace-event format


def test_events_have_what_their_phase_needs(trace: list[dict[str, Any]]) -> None:
    needed = {
        "X": {"name", "ts", "dur", "pid", "tid"}, "C": {"name", "ts", "pid", "args"},
        "M": {"name", "pid", "args"}, "b": {"name", "cat", "id", "ts", "pid"},
        "e": {"name", "cat", "id", "ts", "pid"},
    }  # fmt: skip
    for event in trace:
        assert needed[event["ph"]] <= set(event)
        assert event.get("dur", 0) >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, float) for value in event["args"].values())
    assert {event["ph"] for event in trace} == set(needed)


def test_slices_of_a_thread_do_not_overlap(trace: list[dict[str, Any]]) -> None:
    """Not even those of three cores; Perfetto would draw them wrongly."""
    threads = defaultdict[tuple[int, int], list[tuple[float, float]]](list)
    for event in trace:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for slices in threads.values():
        slices.sort()
        for (_, end), (start, _) in itertools.pairwise(slices):
            assert end <= start + 1e-3  # microseconds
    assert {tid for pid, tid in threads if pid == 0} == {0, 1, 2}


def test_moves_begin_and_end_once(trace: list[dict[str, Any]], result: Result) -> None:
    begun = {e["id"]: e["ts"] for e in trace if e["ph"] == "b"}
    ended = {e["id"]: e["ts"] for e in trace if e["ph"] == "e"}
    assert set(begun) == set(ended)
    assert len(begun) == len(result.tables["transfers"]["start"])
    assert all(ended[i] >= begun[i] for i in begun)


def test_processes_are_named(trace: list[dict[str, Any]]) -> None:
    names = {event["args"]["name"] for event in trace if event["ph"] == "M"}
    assert names == {"client host", "client prefill", "client decode", "requests of chat"}
    pids = {event["pid"] for event in trace}
    assert pids == {event["pid"] for event in trace if event["ph"] == "M"}


def test_busy_time_of_the_trace_is_that_of_the_clients(
    trace: list[dict[str, Any]], result: Result
) -> None:
    for index, client in enumerate(result.clients):
        busy = sum(e["dur"] for e in trace if e["ph"] == "X" and e["pid"] == index)
        assert busy / 1e6 == pytest.approx(client["busy_seconds"], rel=1e-9)


def test_a_trace_of_few_logs(tmp_path: Path) -> None:
    bare = System.parse({**DESCRIPTION, "logs": ["requests"]}).simulate()
    events = json.loads(bare.trace(tmp_path / "t.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M"}


# -- files


def test_csv_has_every_row_and_digit(result: Result, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "out")
    with (folder / "requests.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 60
    assert {row["state"] for row in rows} == {"completed"}
    for name in ("arrival", "end", "first_token", "prompt", "max_gap"):
        np.testing.assert_array_equal([float(r[name]) for r in rows], result.requests[name])
    with (folder / "stages.csv").open(newline="") as stream:
        kinds = {row["kind"] for row in csv.DictReader(stream)}
    assert kinds == {"preprocess", "prefill", "decode"}
    written = {file.stem for file in folder.glob("*.csv")}
    assert written == {"requests", "stages", "steps", "gaps", "breaks", "transfers"}


def test_parquet_has_every_row_and_type(result: Result, tmp_path: Path) -> None:
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    folder = result.save(tmp_path / "out", parquet=True)
    found = parquet.read_table(folder / "requests.parquet")
    assert found.num_rows == 60
    types = {field.name: str(field.type) for field in found.schema}
    assert (types["request"], types["state"], types["end"]) == ("int64", "string", "double")
    np.testing.assert_array_equal(found["end"].to_numpy(), result.requests["end"])
    steps = parquet.read_table(folder / "steps.parquet")
    np.testing.assert_array_equal(steps["joules"].to_numpy(), result.tables["steps"]["joules"])


def test_parquet_without_pyarrow_says_what_to_install(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"need pyarrow(.|\n)*fxgraft\[parquet\]"):
        result.save(tmp_path / "out", parquet=True)


def test_the_summary_is_json(result: Result, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "out")
    text = (folder / "summary.json").read_text()
    summary = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert summary["name"] == "example"
    assert summary["total"]["completed"] == 60
    assert summary["total"]["slo"]["goodput"] == result.summary["total"]["slo"]["goodput"]
    assert set(summary["links"]) == {"node 0 -> node 0"}


def test_plots(result: Result, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = result.plot(tmp_path / "plots")
    assert [path.name for path in paths] == ["latency.svg", "clients.svg"]
    for path in paths:
        assert path.read_text().lstrip().startswith("<?xml")
    cut = System.parse({**DESCRIPTION, "horizon": 0.01}).simulate()
    assert cut.plot(tmp_path / "cut")[0].exists()  # nobody got anything


def test_time_since_moments() -> None:
    moments, times = np.array([3.0, 1.0, 1.0]), np.array([0.0, 1.0, 2.0, 5.0])
    np.testing.assert_allclose(_time_since(moments, times), [0.0, 0.0, 2.0, 10.0])


def test_the_report_names_what_matters(result: Result) -> None:
    text = str(result)
    for words in ("60 of 60 requests completed", "goodput", "time to first token", "p99",
                  "preemptions", "decode", "in transfer"):  # fmt: skip
        assert words in text


# -- token times


@pytest.mark.parametrize("stepwise", [False, True])
def test_token_times_agree_with_the_log(stepwise: bool) -> None:
    found = System.parse(DESCRIPTION).simulate(stepwise=stepwise)
    requests = found.requests
    for row in range(60):
        times = found.token_times(int(requests["request"][row]))
        assert len(times) == requests["emitted"][row]
        assert times[0] == pytest.approx(requests["first_token"][row], rel=1e-12)
        assert times[-1] == pytest.approx(requests["end"][row], rel=1e-9)
        if len(times) > 1:
            assert np.diff(times).min() > 0
            assert np.diff(times).max() == pytest.approx(requests["max_gap"][row], rel=1e-6)


def test_token_times_that_cannot_be_had(result: Result) -> None:
    with pytest.raises(InputError, match="no request 999"):
        result.token_times(999)
    bare = System.parse({**DESCRIPTION, "logs": ["requests", "stages"]}).simulate()
    with pytest.raises(InputError, match="log of steps was not kept"):
        bare.token_times(0)
