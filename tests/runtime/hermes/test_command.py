"""``fxgraft simulate``: reports, files, comparisons, sweeps, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command import command

FILE = """
clients:
  - {name: gpu, cost: {base: 0.01, prefill_token: 5.0e-5, sequence: 5.0e-4, watts: 300.0}}
workloads:
  - {requests: 40, arrivals: {rate: 5}, prompt: 100, output: 10}
slo: {ttft: 0.1}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "system.yaml"
    path.write_text(FILE)
    return path


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    capsys.readouterr()
    assert command("simulate", *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_report(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("simulate", file) == 0
    text = capsys.readouterr().out
    for words in ("40 of 40 requests completed", "tokens/J", "goodput", "p99", "gpu"):
        assert words in text


def test_json_is_the_summary(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, file)
    assert found["total"]["completed"] == 40
    slow = printed(capsys, file, "--stepwise")
    assert slow["total"]["e2e"]["mean"] == pytest.approx(found["total"]["e2e"]["mean"], rel=1e-9)


def test_set_changes_values(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, file, "--set", "workloads.0.requests=7", "--set",
                    "clients.0.cost.base=1e-3", "--set", "clients.0.batching=static")  # fmt: skip
    assert found["total"]["completed"] == 7
    assert found["total"]["tpot"]["p50"] < 0.01


def test_files_go_to_a_folder(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, trace = tmp_path / "out", tmp_path / "trace.json"
    words = ("--out", out, "--plots", "--trace", trace)
    assert command("simulate", file, *words) == 0
    written = {path.name for path in out.iterdir()}
    assert {"summary.json", "requests.csv", "steps.csv", "latency.svg", "clients.svg"} <= written
    assert json.loads(trace.read_text())["traceEvents"]
    pytest.importorskip("pyarrow")
    assert command("simulate", file, "--out", tmp_path / "more", "--parquet") == 0
    assert (tmp_path / "more" / "requests.parquet").exists()


def test_two_systems_side_by_side(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "faster.yaml"
    other.write_text(FILE.replace("base: 0.01", "base: 0.005"))
    assert command("simulate", file, "--against", other) == 0
    text = capsys.readouterr().out
    assert "faster" in text
    assert "joules per token" in text
    found = printed(capsys, file, "--against", other)
    assert found["b"]["total"]["tpot"]["p50"] < found["a"]["total"]["tpot"]["p50"]


def test_a_sweep_is_a_table(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--sweep", "workloads.0.arrivals.rate=2,8", "--sweep",
             "clients.0.batching=chunked,static")  # fmt: skip
    assert command("simulate", file, *words) == 0
    text = capsys.readouterr().out
    assert "arrivals.rate" in text
    assert text.count("40 of 40") == 4
    points = printed(capsys, file, *words)
    assert [point["changes"]["workloads.0.arrivals.rate"] for point in points] == [2, 2, 8, 8]
    assert all(point["total"]["completed"] == 40 for point in points)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sweep", "clients.0.count=1,2", "--out", "x"), "--sweep and --out exclude each other"),
        (("--sweep", "clients.0.count=1,2", "--stepwise"), "--sweep and --stepwise exclude"),
        (("--sweep", "clients.0.count=1,2", "--parquet"), "--sweep and --parquet exclude"),
        (("--parquet",), "give a folder with --out"),
        (("--plots",), "give a folder with --out"),
        (("--set", "clients.0.count"), "'clients.0.count' is no assignment"),
        (("--set", "clients.0.count=-1"), "count"),
        (("--set", "clients.9.count=1"), "leads nowhere"),
        (("--against", "none.yaml"), "none.yaml cannot be read"),
    ],
)  # fmt: skip
def test_wrong_options_exit_with_2(
    file: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("simulate", file, *words) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert message in text


def test_a_wrong_file_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(FILE.replace("requests: 40", "requets: 40"))
    assert command("simulate", file) == 2
    text = capsys.readouterr().err
    assert "bad.yaml, line 5" in text.replace("\n", "")
    assert "did you mean 'requests'" in text.replace("\n", " ")
