"""The command: what it prints for people and for machines, what it writes, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

import fxgraft
from fxgraft import registry, results
from fxgraft.cost_table import StepCostTable
from fxgraft.diff import GraphDiff
from fxgraft.generation.prompts import integers
from tests import model_folder
from tests.command import command

COMMANDS = ["run", "passes", "diff", "draw", "export", "bench", "serve"]

Json = Callable[..., Any]


@dataclass(frozen=True)
class Files:
    """A model folder, and two saved Programs made of it."""

    model: Path
    before: Path
    after: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("files")
    folder = model_folder.write(root / "model")
    program = fxgraft.capture(folder)
    after = fxgraft.compile(program, ["optimize"], backend="torch", check=False).program
    return Files(folder, program.save(root / "before"), after.save(root / "after"))


@pytest.fixture
def json_of(capsys: pytest.CaptureFixture[str]) -> Json:
    """``json_of("passes")``: run the command with ``--json``; returns the document it prints."""

    def run(*words: object) -> Any:
        capsys.readouterr()
        assert command(*words, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return run


def pipeline(folder: Path, model: Path, *lines: str) -> Path:
    file = folder / "pipeline.yaml"
    text = [f"model: {model}", "backend: torch", *lines]
    file.write_text("\n".join(text) + "\n")
    return file


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--help") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(name, "--help") == 0
    printed = capsys.readouterr().out
    assert f"fxgraft {name}" in printed
    assert "--help" in printed


@pytest.mark.parametrize(
    "words", [["nosuch"], ["run"], ["passes", "--nosuch"], ["diff", "one"], ["draw", "model"]]
)
def test_wrong_usage_is_bad_input(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*words) == 2
    printed = capsys.readouterr()
    assert "Usage" in printed.err
    assert not printed.out


def test_exit_codes_of_the_real_process(files: Files) -> None:
    """One process: 0 for a success is in every test here; 2 comes out of the interpreter too."""
    words = [sys.executable, "-m", "fxgraft.cli.main", "passes", "nosuch"]
    source = str(Path(fxgraft.__file__).parents[1])  # the package may not be installed
    paths = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    result = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 2
    assert "there is no pass 'nosuch'" in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout


def test_a_failure_that_is_no_bad_input_ends_with_1(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pass itself finds nothing it can do."""
    prune = 'prune_heads: {heads: {"0": [1]}}'
    file = pipeline(tmp_path, files.before, f"passes: [{prune}, {prune}]")
    assert command("run", file, "--out", tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "cannot be pruned" in printed.err
    assert "what to do" in printed.err
    assert not (tmp_path / "out").exists()


def test_an_interrupt_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "names", interrupt)
    assert command("passes") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--version") == 0
    assert capsys.readouterr().out.strip()


def test_passes_are_listed(json_of: Json, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of("passes")
    assert found.keys() == set(registry.names())
    assert found["optimize"]["effect"] == "exact"
    assert found["seal"]["requires"] == ["causal_lm", "stateless"]
    assert all(facts["summary"] for facts in found.values())
    assert command("passes") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in found)


def test_one_pass_is_shown_with_its_settings(
    json_of: Json, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json_of("passes", "seal")
    assert found.keys() == {"seal"}
    settings = found["seal"]["settings"]
    assert settings["coefficient"]["default"] == 1.0
    assert settings["vector"]["description"]
    assert command("passes", "seal") == 0
    printed = capsys.readouterr().out
    assert "seal (behaviour)" in printed
    assert all(key in printed for key in settings)


def test_the_schema_accepts_pipelines_and_refuses_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("passes", "--schema") == 0
    schema = json.loads(capsys.readouterr().out)
    Draft202012Validator.check_schema(schema)
    validator: Any = Draft202012Validator(schema)
    good = {"model": "smollm2-135m", "passes": ["optimize", {"prune_heads": {"sparsity": 0.1}}]}
    assert validator.is_valid(good)
    assert not validator.is_valid({"passes": ["nosuch"]})
    assert not validator.is_valid({"passes": [{"prune_heads": {"sparsity": 1.0}}]})


def test_run_shows_what_changed_and_answers(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pipeline(
        tmp_path, files.model, "passes: [optimize, prune_heads: {sparsity: 0.3}]", "prompt: hello"
    )
    out = tmp_path / "out"
    words = ("run", file, "--max-new-tokens", 3, "--out", out, "--no-onnx")
    assert command(*words) == 0
    printed = capsys.readouterr()
    assert "What the passes changed" in printed.out
    assert "prune_heads: 2 of 8 query heads removed" in printed.out
    assert "before (torch):" in printed.out
    assert "after (torch):" in printed.out
    for title in ("read", "pass optimize", "pass prune_heads", "graph diff"):
        assert f"… {title}" in printed.err
    assert sorted(path.name for path in out.iterdir()) == ["diff.html", "program"]
    saved = fxgraft.load(out / "program")
    assert isinstance(saved, fxgraft.Program)
    assert [record.name for record in saved.history] == ["optimize", "prune_heads"]
    assert "<html" in (out / "diff.html").read_text()


def test_run_prints_json_alone_on_standard_output(
    files: Files, tmp_path: Path, json_of: Json
) -> None:
    file = pipeline(tmp_path, Path("nosuch"), "passes: [optimize]")
    words = ("--model", files.before, "--prompt", "hello", "--max-new-tokens", 4)
    found = json_of("run", file, *words)
    assert [record["name"] for record in found["passes"]] == ["optimize"]
    answers = found["answers"]
    assert answers["prompt"] == "hello"
    assert answers["before_tokens"] == answers["after_tokens"]
    assert answers["before_backend"] == "torch"
    compiled = fxgraft.compile(fxgraft.capture(files.before), backend="torch")
    ids = torch.tensor([model_folder.tokens_of(files.model, "hello")])
    assert answers["prompt_tokens"] == integers(ids[0])
    expected = compiled.generate(ids, max_new_tokens=4)[0, ids.shape[1] :]
    assert answers["after_tokens"] == integers(expected)
    assert "files" not in found


@pytest.mark.slow
def test_run_exports_onnx_with_the_same_tokens(files: Files, tmp_path: Path, json_of: Json) -> None:
    file = pipeline(tmp_path, files.before, "passes: [optimize]", "prompt: hello")
    found = json_of("run", file, "--out", tmp_path / "out", "--max-new-tokens", 4)
    assert found["answers"]["onnx_tokens"] == found["answers"]["after_tokens"]
    assert (tmp_path / "out" / "onnx" / "decode.onnx").is_file()


def test_run_writes_the_costs_of_a_backend_that_costs(
    files: Files, tmp_path: Path, json_of: Json
) -> None:
    lines = ["backend: flexcim", "options: {hardware: {macros: 2}}", "passes: [optimize]"]
    file = tmp_path / "pipeline.yaml"
    file.write_text("\n".join([f"model: {files.model}", *lines]) + "\n")
    words = ["run", file, "--out", tmp_path / "out", "--no-onnx", "--max-new-tokens", 2]
    result = json_of(*words)
    folder = Path(result["files"]["costs"])
    assert StepCostTable.load(folder / "table.json").identity.backend == "flexcim"
    assert (folder / "decode.csv").is_file()


def test_diff_compares_saved_programs(
    files: Files, tmp_path: Path, json_of: Json, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "diff.html"
    assert command("diff", files.before, files.after, "--html", page) == 0
    printed = capsys.readouterr().out
    assert "made by optimize" in printed
    assert "fxgraft.rms_norm" in printed
    assert "<html" in page.read_text()
    found = json_of("diff", files.before, files.after)
    assert str(GraphDiff.from_json(found)).strip() == printed.strip()


def test_diff_of_a_program_with_itself_says_so(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("diff", files.before, files.before) == 0
    assert "no difference" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "start"), [("a.svg", "<svg"), ("a.html", "<!doctype html>")])
def test_draw_writes_a_picture(files: Files, tmp_path: Path, name: str, start: str) -> None:
    assert command("draw", files.after, "--out", tmp_path / name) == 0
    assert (tmp_path / name).read_text().lower().startswith(start)


def test_draw_refuses_other_kinds_of_files(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("draw", files.after, "--out", tmp_path / "a.png") == 2
    assert ".svg" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_export_writes_checked_files(files: Files, tmp_path: Path, json_of: Json) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "onnx"
    found = json_of("export", files.after, out)
    assert {"prefill.onnx", "decode.onnx"} <= found.keys()
    assert found == {path.name: path.stat().st_size for path in out.iterdir() if path.is_file()}


def test_export_applies_a_pipeline_first(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pipeline(tmp_path, files.before, "passes: [nosuch]")
    assert command("export", files.before, tmp_path / "out", "--passes", file) == 2
    assert "there is no pass 'nosuch'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    """A folder with two scripts and two results."""
    folder = tmp_path / "benchmarks"
    rows = [
        results.row("speed", 3.0, "tokens/s", target=2.0, better="higher", peer=("other", 1.5)),
        results.row("memory", 9.0, "GiB", target=8.0, bound=("floor", 7.0)),
        results.row("size", 5.0, "MB"),
    ]
    results.write("decode", "spine", rows[:2], folder / "results")
    results.write("export", "spine", rows[2:], folder / "results", notes=["a note"])
    (folder / "good.py").write_text("print('ran')\n")
    (folder / "bad.py").write_text("raise SystemExit(3)\n")
    (folder / "_helper.py").write_text("")
    return folder


def test_bench_prints_all_results(
    benchmarks: Path, json_of: Json, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json_of("bench", "--folder", benchmarks, "--summary")
    assert [result["name"] for result in found] == ["decode", "export"]
    speed, memory = found[0]["rows"]
    assert (speed["met"], memory["met"]) == (True, False)
    assert speed["peer"] == {"name": "other", "value": 1.5}
    assert {"system", "hardware", "versions", "command", "date"} <= found[0].keys()
    assert command("bench", "--folder", benchmarks, "--summary") == 0
    printed = capsys.readouterr().out
    assert "decode: speed" in printed
    assert "NO" in printed


def test_bench_writes_the_page(benchmarks: Path, tmp_path: Path) -> None:
    page, folder = tmp_path / "results.md", benchmarks / "results"
    (folder / "decode.svg").write_text("<svg/>")
    assert command("bench", "--folder", benchmarks, "--page", page) == 0
    assert page.read_text() == results.page(results.read_all(folder), folder, page)
    ((picture, name),) = re.findall(r"!\[(.*)\]\((.*)\)", page.read_text())
    assert (picture, (tmp_path / name).resolve()) == ("decode", folder.resolve() / "decode.svg")
    assert "| memory | 9 GiB | ≤ 8 | **no** |  | floor: 7 |" in page.read_text()


def test_bench_lists_and_runs_scripts(benchmarks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("bench", "--folder", benchmarks) == 0
    assert "benchmarks: bad, good" in capfd.readouterr().out
    assert command("bench", "good", "--folder", benchmarks) == 0
    assert "ran" in capfd.readouterr().out
    assert command("bench", "bad", "--folder", benchmarks) == 1
    assert "status 3" in capfd.readouterr().err
    assert command("bench", "nosuch", "--folder", benchmarks) == 2
    assert "the benchmarks are: bad, good" in " ".join(capfd.readouterr().err.split())


def test_bench_refuses_a_damaged_result(
    benchmarks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = benchmarks / "results" / "decode.json"
    file.write_text(file.read_text().replace('"spine"', '"spline"'))
    assert command("bench", "--folder", benchmarks, "--summary") == 2
    assert "field 'system'" in " ".join(capsys.readouterr().err.split())
