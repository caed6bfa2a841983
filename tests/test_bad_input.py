"""Bad input: one typed error with a remedy, nothing half-written, nothing of the caller's lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

import fxgraft
from fxgraft.errors import (
    CaptureError,
    ContractError,
    Error,
    InputError,
    SerializationError,
)
from fxgraft.generation import generate
from fxgraft.sources import embedded_model
from tests import model_folder
from tests.command import command

TWO_DYNAMIC = {"x": {0: "batch", 1: "sequence"}}


@dataclass(frozen=True)
class Tiny:
    """A tiny Llama in every form in which one may give it."""

    folder: Path
    model: nn.Module
    program: fxgraft.Program
    compiled: fxgraft.Compiled
    saved: Path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    model = model_folder.llama()
    folder = model_folder.write(root / "model", model)
    program = fxgraft.capture(folder)
    compiled = fxgraft.compile(program, backend="torch")
    return Tiny(folder, model, program, compiled, program.save(root / "saved"))


@pytest.fixture(autouse=True)
def unchanged(tiny: Tiny) -> Iterator[None]:
    """Whatever a test does, the caller's model, Program and files stay as they are."""
    before = _fingerprint(tiny)
    yield
    assert _fingerprint(tiny) == before


def _fingerprint(tiny: Tiny) -> object:
    parameters = [
        (name, id(value), value._version)
        for name, value in [*tiny.model.named_parameters(), *tiny.program.weights()]
    ]
    files = {
        str(path): path.stat().st_mtime_ns
        for folder in (tiny.folder, tiny.saved)
        for path in folder.rglob("*")
    }
    code = tiny.program.graph_module.code
    origin = json.dumps(tiny.program.origin)
    return tiny.model.training, parameters, files, code, origin, len(tiny.program.history)


@contextmanager
def refused(kind: type[Error], *words: str) -> Generator[None]:
    """The block raises exactly this class, with a remedy and with these words."""
    with pytest.raises(Error) as caught:
        yield
    assert type(caught.value) is kind
    assert caught.value.remedy
    for word in words:
        assert word in str(caught.value)


def check_command(
    capsys: pytest.CaptureFixture[str], code: int, words: list[str], *arguments: object
) -> None:
    """The command ends with this exit code, and its message has these words and a remedy."""
    capsys.readouterr()
    assert command(*arguments) == code
    printed = capsys.readouterr()
    message = " ".join(printed.err.split())
    assert "error:" in message
    assert "what to do:" in message
    assert "Traceback" not in message
    assert not printed.out
    for word in words:
        assert word in message.replace(" ", ""), (word, message)


def pipeline(folder: Path, passes: str, **keys: str) -> Path:
    """A pipeline file; ``passes`` is what follows the key."""
    file = folder / "pipeline.yaml"
    lines = [f"{key}: {value}" for key, value in keys.items()]
    file.write_text("\n".join([*lines, f"passes: {passes}"]) + "\n")
    return file


class Branching(nn.Module):
    """Takes one way or the other by the values it is given."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Looping(nn.Module):
    """A recurrence written as a loop over the sequence."""

    def forward(self, x: Tensor) -> Tensor:
        state, states = torch.zeros_like(x[:, 0]), list[Tensor]()
        for step in range(x.shape[1]):
            state = 0.5 * state + x[:, step]
            states.append(state)
        return torch.stack(states, 1)


class Reshaping(nn.Module):
    """Has the batch size of its author's example written into it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, -1)


class Outer(nn.Module):
    """Holds another module, so that the path in a message has something to say."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), inner])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def line_of(code: str) -> str:
    """``file:line: code`` of the only line of this file that starts with ``code``."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [n for n, line in enumerate(lines, 1) if line.strip().startswith(code)]
    return f"{__file__}:{number}: {lines[number - 1].strip()}"


def test_a_data_dependent_branch_names_module_line_and_remedy() -> None:
    model = Outer(Branching()).train()
    model.blocks[0].eval()
    place = line_of("if x.sum() > 0:")
    with refused(CaptureError, "Outer", "'blocks.1'", place, "torch.where or torch.cond"):
        fxgraft.capture(model, (torch.randn(3, 4),))
    assert model.training
    assert not model.blocks[0].training


@pytest.mark.parametrize(
    ("inner", "dimension", "size", "code"),
    [
        (Looping(), "'sequence' (axis 1 of input 'x')", 5, "for step in range(x.shape[1]):"),
        (Reshaping(), "'batch' (axis 0 of input 'x')", 3, "return x.reshape(3, -1)"),
    ],
    ids=["loop", "written out"],
)
def test_a_frozen_dimension_is_named_with_its_place(
    inner: nn.Module, dimension: str, size: int, code: str
) -> None:
    words = (f"dimension {dimension} was frozen to {size}", "'blocks.1'", line_of(code))
    with refused(CaptureError, *words):
        fxgraft.capture(Outer(inner), (torch.randn(3, 5, 4),), dynamic=TWO_DYNAMIC)


class Long(nn.Module):
    """Does something else with short inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if x.shape[1] > 4 else x


def test_sizes_that_take_another_branch_are_refused() -> None:
    compiled = fxgraft.compile(
        fxgraft.capture(Long(), (torch.randn(3, 7),), dynamic=TWO_DYNAMIC), backend="torch"
    )
    assert torch.equal(compiled(torch.ones(2, 5)), torch.full((2, 5), 2.0))
    with refused(InputError, "'sequence' has size 4", "5 to any size"):
        compiled(torch.ones(2, 4))


def test_an_unknown_pass_is_named_with_the_nearest(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("no pass 'prune_head'", "did you mean 'prune_heads'", "optimize, prune_heads")
    with refused(InputError, *words):
        fxgraft.compile(tiny.program, ["prune_head"])
    file = pipeline(tmp_path, "[prune_head]", model=str(tiny.folder))
    found = ["pipeline.yaml,line2:", "didyoumean'prune_heads'"]
    check_command(capsys, 2, found, "run", file, "--out", tmp_path / "out")
    check_command(capsys, 2, ["didyoumean'prune_heads'"], "passes", "prune_head")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": 3}, ["'model' is a int", "nn.Module"]),
        ({"passes": 3}, ["'passes' is a int", "list of passes"]),
        ({"passes": [3]}, ["passes[0]", "no pass: 3", "optimize"]),
        ({"passes": [fxgraft.Pass]}, ["passes[0]", "no pass"]),
        ({"passes": [{"optimize": 3}]}, ["passes[0]", "are 3"]),
        ({"passes": [{"optimize": {"fuse_norms": "maybe"}}]}, ["'fuse_norms'", "boolean"]),
        ({"passes": [{"prune_heads": {"heads": [1]}}]}, ["'heads'", "dictionary"]),
        ({"passes": [{"prune_heads": {"share": 0.5}}]}, ["no key 'share'", "sparsity (float)"]),
        ({"passes": "optimize"}, ["no .yaml file", "['optimize']"]),
        ({"backend": "tourch"}, ["no backend 'tourch'", "torch"]),
        ({"backend": "torch", "options": [1]}, ["'options' is a list"]),
        ({"backend": "torch", "options": {"mode": "fast"}}, ["'mode'", "eager"]),
    ],
)
def test_arguments_of_the_wrong_type(
    tiny: Tiny, arguments: dict[str, Any], words: list[str]
) -> None:
    with refused(InputError, *words):
        cast(Any, fxgraft).compile(**{"model": tiny.program, **arguments})


@pytest.mark.parametrize(
    ("example", "dynamic", "words"),
    [
        (torch.ones(3, 4), None, ["'example' is a Tensor", "tuple"]),
        ((3,), None, ["example input 'x' is a int"]),
        ((), None, ["missing a required argument: 'x'"]),
        ((torch.ones(3, 4),) * 2, None, ["too many positional arguments"]),
        ({"x": torch.ones(3), "y": torch.ones(3)}, None, ["'y'", "parameters are: x"]),
        (None, None, ["inputs of Branching are not known", "example="]),
        (None, TWO_DYNAMIC, ["without 'example'"]),
        ((torch.ones(3, 4),), {"y": {0: "batch"}}, ["'dynamic' names 'y'"]),
        ((torch.ones(3, 4),), {"x": {2: "batch"}}, ["axis 2", "0 to 1"]),
        ((torch.ones(1, 4),), None, ["size 1", "'batch'", "at least 2"]),
    ],
)
def test_examples_of_the_wrong_type(example: Any, dynamic: Any, words: list[str]) -> None:
    with refused(InputError, *words):
        fxgraft.capture(Branching(), example, dynamic=dynamic)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"input_ids": [[1, 2]]}, ["'input_ids' is a list", "[batch x sequence]"]),
        ({"input_ids": torch.ones(1, 3)}, ["torch.float32", "torch.int64"]),
        ({"input_ids": torch.tensor([1, 2])}, ["(2,)", "[batch x sequence]"]),
        (
            {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 3).long()},
            ["'attention_mask'", "(1, 3)", "sequence=2"],
        ),
        ({"ids": torch.tensor([[1]])}, ["no input 'ids'", "input_ids, attention_mask"]),
        ({}, ["'input_ids' is missing"]),
    ],
)
def test_calls_with_inputs_of_the_wrong_type(
    tiny: Tiny, inputs: dict[str, Any], words: list[str]
) -> None:
    with refused(InputError, *words):
        tiny.compiled(**inputs)


def test_missing_files(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent, out = tmp_path / "absent", tmp_path / "out"
    with refused(InputError, str(absent), "does not exist"):
        fxgraft.capture(absent)
    with refused(InputError, "absent.gguf", "does not exist"):
        fxgraft.capture("absent.gguf")
    with refused(InputError, str(absent), "cannot be read"):
        fxgraft.compile(tiny.program, f"{absent}.yaml")
    with refused(InputError, "'vector'", str(absent)):
        fxgraft.compile(tiny.program, [{"seal": {"vector": str(absent)}}])
    with refused(InputError, "'scores'", str(absent)):
        steps = [{"prune_heads": {"sparsity": 0.5, "scores": str(absent)}}]
        fxgraft.compile(tiny.program, cast(Any, steps))
    with refused(SerializationError, str(absent), "no saved Program"):
        fxgraft.load(absent)
    file = pipeline(tmp_path, "[optimize]", model=str(absent))
    check_command(capsys, 2, ["doesnotexist"], "run", file, "--out", out)
    check_command(capsys, 2, ["absent.yaml"], "run", tmp_path / "absent.yaml", "--out", out)
    check_command(capsys, 2, ["doesnotexist"], "diff", tiny.saved, absent)
    check_command(capsys, 2, ["doesnotexist"], "draw", absent, "--out", tmp_path / "a.svg")
    check_command(capsys, 2, ["doesnotexist"], "export", absent, out)
    check_command(capsys, 2, ["isnofolder"], "bench", "--folder", absent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline.yaml"]


def test_a_pass_order_that_cannot_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fxgraft.passes.optimize import Optimize
    from fxgraft.passes.prune_heads import PruneHeads

    monkeypatch.setattr(Optimize, "after", frozenset({"prune_heads"}))
    monkeypatch.delattr(PruneHeads, "run")
    monkeypatch.delattr(Optimize, "run")
    words = ("'optimize' must come after pass 'prune_heads'", "move 'prune_heads' before")
    with refused(ContractError, *words):
        fxgraft.compile(tiny.program, ["optimize", {"prune_heads": {"sparsity": 0.5}}])
    file = pipeline(tmp_path, "[optimize, prune_heads]", model=str(tiny.saved))
    found = ["line2:", "'optimize'mustcomeafterpass'prune_heads'"]
    check_command(capsys, 2, found, "run", file, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pass_on_a_model_that_lacks_what_it_requires() -> None:
    with refused(ContractError, "'prune_heads' requires", "'has_attention'"):
        fxgraft.compile(
            nn.Linear(4, 4), ["prune_heads"], example=(torch.ones(3, 4),), backend="torch"
        )


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        (torch.full((model_folder.HIDDEN,), float("nan")), ["'vector'", "finite", "NaN"]),
        (torch.ones(32), ["32 values", f"hidden size is {model_folder.HIDDEN}"]),
    ],
    ids=["NaN", "wrong width"],
)
def test_vectors_that_cannot_be_used(
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    vector: Tensor,
    words: list[str],
) -> None:
    file = model_folder.write_vector(tmp_path / "bad.safetensors", vector=vector)
    seal = {"vector": str(file), "tokenizer": str(tiny.folder)}
    with refused(InputError, "'seal'", *words):
        fxgraft.compile(tiny.program, ["optimize", {"seal": seal}], check=False)
    text = f"[optimize, {{seal: {{vector: bad.safetensors, tokenizer: {tiny.folder}}}}}]"
    found = ["line2:", *(word.replace(" ", "") for word in words)]
    source = pipeline(tmp_path, text, model=str(tiny.saved))
    check_command(capsys, 2, found, "run", source, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 7, float("nan")])
def test_sparsity_outside_its_range(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], sparsity: float
) -> None:
    with refused(InputError, "key 'sparsity' of pass 'prune_heads'", "sparsity (float)"):
        fxgraft.compile(tiny.program, [{"prune_heads": {"sparsity": sparsity}}])
    text = f"[prune_heads: {{sparsity: {'.nan' if sparsity != sparsity else sparsity}}}]"
    file = pipeline(tmp_path, text, model=str(tiny.saved))
    check_command(capsys, 2, ["line2:", "'sparsity'"], "run", file)


@pytest.mark.parametrize("length", [0, 3, 4, 20, 1000, 300_000])
def test_a_truncated_gguf_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], length: int
) -> None:
    file = tmp_path / "model.gguf"
    with embedded_model().open("rb") as stream:
        file.write_bytes(stream.read(length))
    with refused(InputError, str(file)):
        fxgraft.capture(file)
    check_command(capsys, 2, ["model.gguf"], "draw", file, "--out", tmp_path / "drawing.svg")
    assert not (tmp_path / "drawing.svg").exists()


@pytest.mark.slow
def test_a_gguf_file_truncated_among_its_tensors(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with embedded_model().open("rb") as stream:
        file.write_bytes(stream.read(40_000_000))
    with refused(InputError, str(file), "truncated"):
        fxgraft.capture(file)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_safetensors_of_a_model(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder)
    _truncate(folder / "model.safetensors", share)
    with refused(InputError, "model.safetensors", "truncated"):
        fxgraft.capture(folder)
    check_command(capsys, 2, ["model.safetensors"], "export", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_safetensors_of_a_saved_program(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(tiny.saved, folder)
    _truncate(folder / "weights.safetensors", share)
    for read in (fxgraft.load, fxgraft.capture):
        with refused(SerializationError, "weights.safetensors"):
            read(folder)
    check_command(capsys, 2, ["weights.safetensors"], "diff", folder, tiny.saved)


def _truncate(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def test_a_folder_that_is_no_program(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with refused(SerializationError, str(tmp_path), "is no saved Program"):
        fxgraft.load(tmp_path)
    with refused(SerializationError, str(tiny.folder), "is no saved Program"):
        fxgraft.load(tiny.folder)
    with refused(InputError, "neither config.json", "nor program.json"):
        fxgraft.capture(tmp_path)
    check_command(capsys, 2, ["neitherconfig.json"], "diff", tiny.saved, tmp_path)
    with refused(InputError, "'folder' is a int"):
        cast(Any, fxgraft).load(3)


def test_a_file_from_a_newer_version(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "newer"
    shutil.copytree(tiny.saved, folder)
    file = folder / "program.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 99', 1))
    for read in (fxgraft.load, fxgraft.capture):
        with refused(SerializationError, "99", "upgrade fxgraft"):
            read(folder)
    check_command(capsys, 2, ["upgradefxgraft"], "draw", folder, "--out", tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()


@pytest.mark.parametrize("prompt", [[], [[]], [[1, 2], []], torch.ones(1, 0, dtype=torch.int64)])
def test_an_empty_prompt(tiny: Tiny, prompt: Any) -> None:
    with refused(InputError, "prompt", "at least one"):
        tiny.compiled.generate(prompt)


def test_an_empty_prompt_on_the_command_line(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pipeline(tmp_path, "[optimize]", model=str(tiny.folder))
    found = ["thepromptisempty"]
    check_command(capsys, 2, found, "run", file, "--prompt", "", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prompt_over_the_context_length(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, limit = [1] * (model_folder.CONTEXT + 4), model_folder.CONTEXT
    with refused(InputError, f"has {limit + 4} tokens", f"context holds {limit}", "5 tokens"):
        tiny.compiled.generate([[1, 2], long], max_new_tokens=1)
    with refused(InputError, f"context of {limit}", "max_new_tokens to at most 6"):
        tiny.compiled.generate([long[: limit - 6]], max_new_tokens=7)
    file = pipeline(tmp_path, "[optimize]", model=str(tiny.saved), backend="torch")
    words = ("run", file, "--prompt", "a" * 200, "--out", tmp_path / "out")
    check_command(capsys, 2, ["prompt0has200tokens"], *words, "--json")
    assert not (tmp_path / "out").exists()


def test_token_ids_that_the_model_lacks(tiny: Tiny) -> None:
    with refused(InputError, "300", "outside the vocabulary of 300"):
        tiny.compiled.generate([[1, 300]])


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Nothing can be written through to the disk."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


@pytest.mark.parametrize("what", ["program", "compiled"])
def test_a_full_disk_while_saving(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    source: fxgraft.Program | fxgraft.Compiled = getattr(tiny, what)
    old = fxgraft.capture(nn.Linear(4, 4), (torch.ones(3, 4),)).save(tmp_path / "old")
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    for folder in (tmp_path / "new", old):
        with (
            full_disk(monkeypatch),
            refused(SerializationError, str(folder), "disk is full", "free some space"),
        ):
            source.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before


def test_a_full_disk_on_the_command_line(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = pipeline(tmp_path, "[optimize]", model=str(tiny.saved), backend="torch")
    words = ("run", file, "--out", tmp_path / "out", "--no-onnx", "--max-new-tokens", 1, "--json")
    with full_disk(monkeypatch):
        check_command(capsys, 1, ["diskisfull"], *words)
    assert not (tmp_path / "out" / "program").exists()


def _rename(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["surplus"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _reshape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(model_folder.HIDDEN + 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _unknown_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no_such_model"}')


def _break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def _miss_shard(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_rename, "'model.norm.weight'"),
        (_reshape, "'model.norm.weight'"),
        (_break_config, "config.json"),
        (_unknown_model, "config.json"),
        (_break_index, "model.safetensors.index.json"),
        (_miss_shard, "model-00002-of-00002.safetensors"),
        (_remove_weights, "no .safetensors weights"),
    ],
)
def test_damaged_model_folders(
    tiny: Tiny, tmp_path: Path, damage: Callable[[Path], None], word: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder)
    damage(folder)
    with refused(InputError, word):
        fxgraft.capture(folder)


def test_generation_options_that_make_no_sense(tiny: Tiny) -> None:
    with refused(InputError, "no generation option 'max_length'", "max_new_tokens"):
        cast(Any, generate)(tiny.compiled.step_model, [[1]], max_length=3)
    with refused(InputError, "temperature", "above 0"):
        tiny.compiled.generate([[1]], temperature=0.0)
