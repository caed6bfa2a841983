"""Two tables under one workload, two systems, and many points of a sweep."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fxgraft.cost_table import Memory
from fxgraft.errors import InputError
from fxgraft.runtime.hermes import Workload, compare, sweep
from tests.runtime.hermes._tables import table

WORKLOAD: dict[str, Any] = {
    "requests": 200, "arrivals": {"rate": 4.0}, "prompt": 200, "output": 20,
    "slo": {"ttft": 0.2, "tpot": 0.02},
}  # fmt: skip


def test_a_faster_table_is_better_in_every_figure() -> None:
    """What a pass does: half the time of each step, half the energy."""
    found = compare(table(watts=300.0), table(base=0.005, watts=300.0), WORKLOAD)
    figures = {figure.name: figure for figure in found.figures}
    expected = {f"{name} {p}" for name in ("ttft", "tpot", "itl", "e2e") for p in ("p50", "p99")}
    expected |= {"output tokens/s", "goodput requests/s", "joules per token"}
    assert set(figures) == expected
    for figure in figures.values():
        assert figure.change < 0 if figure.lower_is_better else figure.change >= 0
    assert figures["tpot p50"].change == pytest.approx(-0.48, abs=0.05)
    text = str(found)
    assert "joules per token" in text
    assert "goodput" in text


def test_a_table_against_itself_changes_nothing() -> None:
    found = compare(table(watts=300.0), table(watts=300.0), WORKLOAD)
    assert {figure.change for figure in found.figures} == {0.0}


def test_requests_are_the_same_one_by_one() -> None:
    found = compare(table(), table(base=0.02), Workload.model_validate(WORKLOAD), seed=9)
    for column in ("arrival", "prompt", "output"):
        ours, theirs = found.a.requests, found.b.requests
        assert sorted(ours[column]) == sorted(theirs[column])
    other = compare(table(), table(), WORKLOAD, seed=10)
    assert sorted(other.a.requests["arrival"]) != sorted(found.a.requests["arrival"])


def test_smaller_weights_leave_more_blocks() -> None:
    growing = table().memory.growing
    heavy = table(memory=Memory(weights=80_000, growing=growing, capacity=100_000))
    light = table(memory=Memory(weights=40_000, growing=growing, capacity=100_000))
    found = compare(heavy, light, WORKLOAD)
    blocks = [result.clients[0]["blocks"] for result in (found.a, found.b)]
    assert blocks == [10_000 // 160, 50_000 // 160]
    equal = compare(heavy, light, WORKLOAD, client={"blocks": 500})
    assert {r.clients[0]["blocks"] for r in (equal.a, equal.b)} == {500}


def test_tables_from_files_give_their_names(tmp_path: Path) -> None:
    dense, sparse = (t.save(tmp_path / f"{name}.json") for name, t in
                     (("dense", table()), ("sparse", table(base=0.005))))  # fmt: skip
    found = compare(dense, str(sparse), WORKLOAD)
    assert (found.a.name, found.b.name) == ("dense", "sparse")
    assert str(found).splitlines()[0].split() == ["dense", "sparse", "change"]


@pytest.mark.parametrize(
    ("workload", "options", "message"),
    [
        ({"requests": 0}, {}, "requests is 0"),
        ({"speed": 1}, {}, "no key 'speed'"),
        ({"chain": ["rag", "prefill"]}, {}, "cannot run 'rag'"),
        ({}, {"client": {"batching": "chunky"}}, "chunky"),
        ({}, {"client": {"blokcs": 5}}, "did you mean 'blocks'"),
        ({}, {"outside": "ignore"}, "'ignore'"),
    ],
)
def test_wrong_comparisons(workload: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(table(), table(), WORKLOAD | workload, **options)


def test_a_comparison_of_cut_off_runs_has_no_change() -> None:
    """Infinite figures are shown as cut off, not as a percentage."""
    crowd = WORKLOAD | {"arrivals": {"kind": "regular", "rate": 1e6}, "timeout": 1.0}
    found = compare(table(), table(base=0.5), crowd, client={"max_sequences": 16})
    figures = {figure.name: figure for figure in found.figures}
    assert figures["e2e p50"].b == math.inf
    assert math.isnan(figures["e2e p50"].change)
    assert "cut off" in str(found)


# -- sweeps

FILE = """
clients:
  - name: gpu
    count: 1
    cost: {base: 0.01, prefill_token: 5.0e-5}
workloads:
  - {requests: 60, arrivals: {rate: 5}, prompt: 100, output: 10}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "system.yaml"
    path.write_text(FILE)
    return path


def test_a_sweep_simulates_every_combination(file: Path) -> None:
    points = sweep(file, {"clients.0.count": [1, 2], "workloads.0.prompt": [50, 100, 200]})
    chosen = [tuple(point.changes.values()) for point in points]
    assert chosen == [(1, 50), (1, 100), (1, 200), (2, 50), (2, 100), (2, 200)]
    means = [point.summary["total"]["ttft"]["mean"] for point in points]
    assert means[0] < means[1] < means[2]
    assert len(points[3].summary["clients"]) == 2


def test_all_points_are_checked_before_the_first_runs(file: Path) -> None:
    with pytest.raises(InputError, match=r"workloads\.0\.prompt.*-5"):
        sweep(file, {"workloads.0.prompt": [100, -5]})
    with pytest.raises(InputError, match="there is no 'client'"):
        sweep(file, {"client.0.count": [1]})


def test_ray_is_optional(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"needs ray(.|\n)*fxgraft\[ray\]"):
        sweep(file, {"clients.0.count": [1, 2]}, engine="ray")


def test_ray_gets_every_point_and_is_left_as_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in that runs tasks at once: what is asked of Ray, and in which order."""
    calls: list[str] = []
    fake: Any = ModuleType("ray")

    class Task:
        def __init__(self, function: Any) -> None:
            self.function = function

        def remote(self, *arguments: Any) -> Any:
            calls.append("remote")
            return self.function(*arguments)

    fake.is_initialized = lambda: False
    fake.init = lambda **options: calls.append("init")
    fake.remote = Task
    fake.get = list
    fake.shutdown = lambda: calls.append("shutdown")
    monkeypatch.setitem(sys.modules, "ray", fake)
    values = {"clients.0.count": [1, 2]}
    assert repr(sweep(file, values, engine="ray")) == repr(sweep(file, values))
    assert calls == ["init", "remote", "remote", "shutdown"]
