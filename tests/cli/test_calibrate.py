"""``fxgraft calibrate``: artifacts from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fxgraft
from fxgraft import artifact
from fxgraft.passes.flow import Flow
from tests import model_folder
from tests.command import command

SET = ("--set", "samples=4", "--set", "length=16", "--set", "criterion=uniform")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The first line of a short text.\n" * 4)
    return path


def test_an_artifact_is_made_and_used(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "masks"
    code = command("calibrate", "flow", model, "--out", out, "--data", text, "--json", *SET)
    assert code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["results"]["sparsity"] == 0.5
    assert printed["folder"] == str(out)
    stored = artifact.read(out, "flow")
    assert stored.settings["samples"] == 4
    assert stored.model["source"] == str(model)
    (tmp_path / "pipeline.yaml").write_text(f"model: {model}\npasses:\n- flow: {{artifact: masks}}")
    pruned = fxgraft.compile(str(model), str(tmp_path / "pipeline.yaml"), backend="torch").program
    assert "sparsity 0.5, as asked" in pruned.history[-1].summary[0]


def test_settings_of_a_file_are_changed_by_the_command_line(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "flow.yaml"
    settings.write_text("budget: 0.25\nsamples: 4\nlength: 16\ncriterion: uniform\ndata: [a.txt]\n")
    (tmp_path / "a.txt").write_text(text.read_text())
    arguments = ("--out", tmp_path / "masks", "--settings", settings)
    assert command("calibrate", "flow", model, *arguments, "--set", "budget=0.75") == 0
    assert "sparsity 0.75, as asked" in capsys.readouterr().out
    assert artifact.read(tmp_path / "masks", "flow").settings["data"] == [str(tmp_path / "a.txt")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("optimize",), "has no offline stage"),
        (("flow", "--set", "sparsity=0.5"), "has no key 'sparsity'"),
        (("flow", "--set", "budget"), "write --set KEY=VALUE"),
        (("flow", "--set", "budget=1.5"), "budget"),
        (("flow", "--set", "m=[4"), "no YAML value"),
        (("flow",), "no calibration data"),
    ],
)
def test_bad_input(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    name, *options = words
    assert command("calibrate", name, model, "--out", tmp_path / "out", *options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_text_that_is_too_short(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("short")
    arguments = ("--out", tmp_path / "out", "--data", tmp_path / "short.txt", *SET)
    assert command("calibrate", "flow", model, *arguments) == 2
    assert "5 tokens, one sequence needs 16" in " ".join(capsys.readouterr().err.split())


def test_what_is_no_artifact_is_not_overwritten(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    arguments = ("--out", tmp_path / "out", "--data", text, *SET)
    assert command("calibrate", "flow", model, *arguments) == 1
    assert (tmp_path / "out" / "letter.txt").read_text() == "dear"


def test_artifacts_are_for_one_pass(tmp_path: Path) -> None:
    program = fxgraft.capture(model_folder.llama())
    artifact.write(tmp_path / "a", "other", program, settings={}, results={}, tensors={}, texts={})
    with pytest.raises(fxgraft.Error, match="for pass 'other'"):
        fxgraft.compile(program, [Flow(artifact=tmp_path / "a")], backend="torch")
