"""Exported and lowered models: files, names, numbers, tokens, and what happens when it fails."""

from __future__ import annotations

import errno
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
import pytest
import torch
import transformers
from torch import Tensor, nn

import fxgraft
from fxgraft import graph as graphs
from fxgraft.backends.onnx import BACKEND, exporting, verify
from fxgraft.backends.onnx.compiled import OnnxCompiled
from fxgraft.backends.onnx.step_model import OnnxStepModel
from fxgraft.backends.onnx.weights import WeightFile
from fxgraft.errors import InputError, LoweringError, SerializationError
from fxgraft.program import Program
from tests import models

FAMILIES = ("llama", "mistral", "gemma2", "gpt2", "opt", "mamba", "jamba")
FAST = ("llama", "gpt2", "jamba")
PROMPTS = [[5, 17, 9, 4, 33, 8, 71, 12, 3], [8, 3, 90]]
ort, library = cast(Any, onnxruntime), cast(Any, transformers)


@cache
def program(family: str) -> Program:
    return fxgraft.capture(getattr(models, family)())


@cache
def tokens(family: str) -> Tensor:
    compiled = fxgraft.compile(program(family), backend="torch")
    return compiled.generate(PROMPTS, max_new_tokens=9, eos_token_id=[])


def slow_unless(fast: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=() if fast else (pytest.mark.slow,))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fxgraft.export_onnx(program("llama"), tmp_path_factory.mktemp("onnx") / "llama")


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "fxgraft.json").read_text())


def graph_of(file: Path) -> Any:
    return cast(Any, onnx).load(file, load_external_data=False).graph


def plain_session(file: Path) -> Any:
    return ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def without_fxgraft(folder: Path, prompts: list[list[int]], count: int) -> np.ndarray:
    """Greedy tokens by plain onnxruntime, with nothing but the files."""
    facts = facts_of(folder)
    sessions = [plain_session(folder / facts["files"][name]) for name in ("prefill", "decode")]
    longest = max(map(len, prompts))
    ids = np.array([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    state: dict[str, Any] = {}
    for one in facts["states"]:
        sizes = [0 if isinstance(size, str) else size for size in one["shape"][1:]]
        state[one["name"]] = np.zeros([len(prompts), *sizes], one["dtype"])
    taken = {value.name for value in sessions[0].get_inputs()}
    found: list[Any] = []
    for step in range(count):
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        given = {name: value for name, value in given.items() if name in taken} | state
        logits, *present = sessions[min(step, 1)].run(None, given)
        state = dict(zip(state, present, strict=True))
        ids = logits[:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
        found.append(ids)
    return np.concatenate(found, 1)


@pytest.mark.parametrize(
    ("family", "opset"),
    [slow_unless(f in FAST and o in (18, 23) and (f, o) != ("jamba", 23), f, o)
     for o in (18, 20, 21, 23, 25) for f in FAMILIES],
)  # fmt: skip
def test_files_give_the_tokens_of_torch_in_plain_onnxruntime(
    family: str, opset: int, tmp_path: Path
) -> None:
    folder = fxgraft.export_onnx(program(family), tmp_path / "out", opset=opset)
    facts = facts_of(folder)
    assert facts["opset"] == opset
    assert facts["check"]["max_relative_error"] <= 1e-4
    found = without_fxgraft(folder, PROMPTS, 9)
    assert torch.equal(torch.from_numpy(found), tokens(family)[:, 9:])  # pyright: ignore
    for name in ("prefill", "decode"):
        cast(Any, onnx).checker.check_model(str(folder / f"{name}.onnx"))
        domains = {node.domain for node in graph_of(folder / f"{name}.onnx").node}
        assert domains == {""}, "standard operators only"


@pytest.mark.parametrize("family", [slow_unless(f in FAST, f) for f in FAMILIES])
def test_lowered_models_generate_what_torch_generates(family: str) -> None:
    compiled = fxgraft.compile(program(family), backend="onnx")
    assert isinstance(compiled, OnnxCompiled)
    assert torch.equal(
        compiled.generate(PROMPTS, max_new_tokens=9, eos_token_id=[]), tokens(family)
    )
    assert isinstance(compiled.step_model, OnnxStepModel)
    ids = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    expected = program(family)(ids)[program(family).outputs.index("logits")]
    assert torch.allclose(compiled(ids).logits, expected, atol=1e-4)


def test_optimized_programs_export(tmp_path: Path) -> None:
    compiled = fxgraft.compile(program("llama"), ["optimize"], backend="onnx")
    folder = fxgraft.export_onnx(compiled, tmp_path / "out", opset=23)
    operators = {node.op_type for node in graph_of(folder / "decode.onnx").node}
    assert {"RMSNormalization", "RotaryEmbedding"} <= operators
    found = without_fxgraft(folder, PROMPTS, 9)
    assert torch.equal(torch.from_numpy(found), tokens("llama")[:, 9:])  # pyright: ignore


def test_names_and_dimensions_are_those_of_optimum(exported: Path) -> None:
    session = plain_session(exported / "prefill.onnx")
    inputs = {value.name: value.shape for value in session.get_inputs()}
    outputs = {value.name: value.shape for value in session.get_outputs()}
    assert list(inputs)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert inputs["input_ids"] == ["batch", "sequence"]
    assert inputs["attention_mask"] == ["batch", "total"]
    assert inputs["past_key_values.2.value"] == ["batch", 2, "past", 16]
    assert outputs["logits"] == ["batch", 1, models.VOCABULARY]
    assert outputs["present.2.value"] == ["batch", 2, "total", 16]
    decode = plain_session(exported / "decode.onnx")
    assert decode.get_inputs()[0].shape == ["batch", 1]
    assert [value.name for value in decode.get_inputs()] == list(inputs)


def test_layers_of_mixed_models_are_numbered_as_in_the_model(tmp_path: Path) -> None:
    states = facts_of(fxgraft.export_onnx(program("jamba"), tmp_path / "out", check=False))[
        "states"
    ]
    assert [state["name"] for state in states][:4] == [
        "past_states.0.conv", "past_states.0.ssm", "past_key_values.1.key",
        "past_key_values.1.value",
    ]  # fmt: skip
    assert states[1]["present"] == "present_states.0.ssm"


def test_windowed_states_are_cut(tmp_path: Path) -> None:
    folder = fxgraft.export_onnx(program("mistral"), tmp_path / "out")
    state = facts_of(folder)["states"][0]
    assert (state["shape"], state["limit"]) == (["batch", 2, "past_5", 16], 5)
    session = plain_session(folder / "prefill.onnx")
    assert session.get_outputs()[1].shape == ["batch", 2, "present_5", 16]
    given = {
        "input_ids": np.ones((3, 11), np.int64),
        "attention_mask": np.ones((3, 11), np.int64),
        "position_ids": np.arange(11)[None].repeat(3, 0),
        **{one["name"]: np.zeros((3, 2, 0, 16), np.float32) for one in facts_of(folder)["states"]},
    }
    present = session.run([state["present"]], given)[0]
    assert present.shape == (3, 2, 5, 16)


def test_weights_are_stored_once(exported: Path) -> None:
    assert {file.name for file in exported.iterdir()} == {
        "prefill.onnx", "decode.onnx", "weights.bin", "fxgraft.json"
    }  # fmt: skip
    places: dict[str, set[str]] = {}
    for name in ("prefill", "decode"):
        for tensor in graph_of(exported / f"{name}.onnx").initializer:
            offsets = [entry.value for entry in tensor.external_data if entry.key == "offset"]
            places.setdefault(tensor.name, set()).update(offsets)
    large = {name: found for name, found in places.items() if found}
    assert all(len(found) == 1 for found in large.values())
    assert len(large) == len({next(iter(found)) for found in large.values()})
    # Alignment adds at most a page per tensor.
    slack = 4096 * len(large)
    assert (exported / "weights.bin").stat().st_size <= program("llama").count_bytes() + slack


def test_no_weight_is_transposed_at_run_time(exported: Path) -> None:
    for name in ("prefill", "decode"):
        graph = graph_of(exported / f"{name}.onnx")
        weights = {tensor.name for tensor in graph.initializer}
        for node in graph.node:
            assert node.op_type not in ("Transpose", "Identity", "Cast") or weights.isdisjoint(
                node.input
            )
    assert "Transpose" not in {
        node.op_type for node in graph_of(exported / "decode.onnx").node if "attn" not in node.name
    }


def test_masks_and_positions_are_computed_once_for_all_layers(exported: Path) -> None:
    for name in ("prefill", "decode"):
        operators = [node.op_type for node in graph_of(exported / f"{name}.onnx").node]
        assert [operators.count(op) for op in ("Cos", "Sin", "Greater", "ReduceMax")] == [1] * 4
        assert operators.count("LessOrEqual") == (1 if name == "prefill" else 0)
        assert operators.count("Softmax") == 3


class Convolutions(nn.Module):
    """A small image classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=2), nn.GroupNorm(2, 8), nn.SiLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


@cache
def convolutions() -> Program:
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    return fxgraft.capture(Convolutions().eval(), {"images": torch.randn(2, 3, 32, 32)})


@cache
def bert() -> Program:
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    config = library.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    return fxgraft.capture(library.BertModel(config).eval())


@pytest.mark.parametrize("opset", [18, 23])
def test_other_models_become_one_file(opset: int, tmp_path: Path) -> None:
    folder = fxgraft.export_onnx(convolutions(), tmp_path / "out", opset=opset)
    assert {file.name for file in folder.iterdir()} == {"model.onnx", "fxgraft.json"}
    session = plain_session(folder / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]
    images = torch.randn(7, 3, 32, 32)
    (found,) = session.run(None, {"images": images.numpy()})
    assert torch.allclose(torch.from_numpy(found), convolutions()(images)[0], atol=1e-5)  # pyright: ignore


def test_encoders_export_with_dynamic_batch_and_sequence(tmp_path: Path) -> None:
    folder = fxgraft.export_onnx(bert(), tmp_path / "out")
    session = plain_session(folder / "model.onnx")
    ids = torch.randint(3, 100, (3, 17))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    found = session.run(["last_hidden_state"], {
        "input_ids": ids.numpy(), "attention_mask": mask.numpy(),
        "position_ids": torch.arange(17).expand(3, 17).numpy(),
    })[0]  # fmt: skip
    expected = bert()(input_ids=ids, attention_mask=mask)[0]
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)  # pyright: ignore


def test_large_models_keep_their_weights_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "EXTERNAL_BYTES", 10_000)
    folder = fxgraft.export_onnx(bert(), tmp_path / "out")
    assert (folder / "weights.bin").stat().st_size > 10_000
    assert (folder / "model.onnx").stat().st_size < (folder / "weights.bin").stat().st_size
    plain_session(folder / "model.onnx")


def test_models_that_cannot_keep_state_become_one_file_and_still_generate(tmp_path: Path) -> None:
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    config = library.GPTNeoConfig(
        vocab_size=100, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64,
        attention_types=[[["global"], 2]], max_position_embeddings=64,
    )  # fmt: skip
    captured = fxgraft.capture(library.GPTNeoForCausalLM(config).eval())
    folder = fxgraft.export_onnx(captured, tmp_path / "out")
    assert (folder / "model.onnx").is_file()
    assert "mixes tokens" in facts_of(folder)["no_state_because"]
    both = [fxgraft.compile(captured, backend=name) for name in ("onnx", "torch")]
    found, expected = (one.generate(PROMPTS, max_new_tokens=4, eos_token_id=[]) for one in both)
    assert torch.equal(found, expected)
    assert "recomputes the whole sequence" in str(both[0].report())


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float16, "float16"), (torch.bfloat16, "float32")]
)
def test_half_precision(dtype: torch.dtype, stored: str, tmp_path: Path) -> None:
    folder = fxgraft.export_onnx(fxgraft.capture(models.llama().to(dtype)), tmp_path / "out")
    facts = facts_of(folder)
    assert {facts["outputs"][0]["dtype"], *(s["dtype"] for s in facts["states"])} == {stored}
    assert facts["check"]["tolerance"] == verify.TOLERANCE[dtype]
    assert facts["check"]["max_relative_error"] > 0


def test_the_report_says_what_each_operator_became() -> None:
    compiled = fxgraft.compile(program("mamba"), ["optimize"], backend="onnx")
    lines = {line.op: line for line in compiled.report().lines}
    assert lines["aten.linear"].runs_on == "onnxruntime MatMul"
    assert "Scan" in lines["fxgraft.selective_scan"].runs_on
    assert "token by token" in lines["fxgraft.selective_scan"].reason
    assert "inlined" in lines["fxgraft.rms_norm"].runs_on
    newer = fxgraft.compile(program("mamba"), ["optimize"], backend="onnx", options={"opset": 23})
    lines = {line.op: line for line in newer.report().lines}
    assert lines["fxgraft.rms_norm"].runs_on == "onnxruntime RMSNormalization"


def test_in_place_operators_are_made_functional(tmp_path: Path) -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            view = y[:, 1:3]
            before = y.sum(-1)
            view.add_(10.0)
            y[:, 0] = 7.0
            y.transpose(0, 1)[4].mul_(3.0)
            return torch.stack((before, y.sum(-1), view.sum(-1)))

    captured = fxgraft.capture(InPlace(), {"x": torch.randn(2, 5)})
    assert any("add_" in graphs.short_target(node) for node in captured.graph.nodes)
    folder = fxgraft.export_onnx(captured, tmp_path / "out")
    x = torch.randn(4, 5)
    (found,) = plain_session(folder / "model.onnx").run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(found), InPlace()(x), atol=1e-5)  # pyright: ignore


class Unknown(nn.Module):
    """Has an operator that ONNX has no form of."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Any, torch.special).bessel_j0(x)


def test_an_operator_without_a_form_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    captured = fxgraft.capture(Unknown(), {"x": torch.randn(2, 3)})
    with pytest.raises(LoweringError, match=r"special_bessel_j0.*no form") as caught:
        fxgraft.export_onnx(captured, tmp_path / "out")
    assert "test_onnx.py" in str(caught.value)
    assert "bessel_j0(x)" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def old_export(tmp_path: Path) -> Iterator[Path]:
    """An older export; checks that it is as it was afterwards."""
    folder = fxgraft.export_onnx(convolutions(), tmp_path / "out")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    yield folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_failing_check_leaves_the_old_folder(
    old_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "TOLERANCE", {torch.float32: 1e-12})
    with pytest.raises(LoweringError, match="logits of batch 2 after tokens 0 to 4"):
        fxgraft.export_onnx(program("llama"), old_export)


def test_a_full_disk_leaves_the_old_folder(
    old_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WeightFile, "_append", fail)
    with pytest.raises(SerializationError, match="disk is full"):
        fxgraft.export_onnx(program("llama"), old_export)


def test_a_full_disk_while_lowering_is_a_lowering_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WeightFile, "_append", fail)
    compiled = fxgraft.compile(program("llama"), backend="onnx")
    with pytest.raises(LoweringError, match="temporary folder"):
        compiled.generate(PROMPTS, max_new_tokens=2)


def test_an_export_replaces_an_older_one_of_another_kind(tmp_path: Path) -> None:
    folder = fxgraft.export_onnx(convolutions(), tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    fxgraft.export_onnx(program("gpt2"), folder, check=False)
    assert {file.name for file in folder.iterdir()} == {
        "prefill.onnx", "decode.onnx", "weights.bin", "fxgraft.json", "notes.txt"
    }  # fmt: skip


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(SerializationError, match=r"holds no fxgraft\.json"):
        fxgraft.export_onnx(convolutions(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("opset", [11, 17, 28, 99])
def test_unsupported_opsets_are_refused(opset: int, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=f"opset {opset} .*\n.*18 to 27"):
        fxgraft.export_onnx(convolutions(), tmp_path / "out", opset=opset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opsett": 18}, "opsett"),
        ({"threads": 0}, "threads"),
        ({"optimization": "most"}, "optimization"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BACKEND.lower(convolutions(), **options)


def test_weights_without_values_are_refused() -> None:
    captured = fxgraft.capture(models.llama().to("meta"))
    with pytest.raises(LoweringError, match="meta"):
        fxgraft.export_onnx(captured, "never")


def _without(missing: str, found: Callable[[str], object], name: str) -> object:
    return None if name == missing else found(name)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Callable[[str], object] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", partial(_without, "onnxruntime", found))
    assert BACKEND.available() == "not installed: onnxruntime"
    with pytest.raises(LoweringError, match="onnxruntime"):
        fxgraft.export_onnx(convolutions(), "never")


def test_saved_compiled_models_load_with_their_options(tmp_path: Path) -> None:
    compiled = fxgraft.compile(convolutions(), backend="onnx", options={"opset": 21})
    loaded = fxgraft.load(compiled.save(tmp_path / "saved"))
    assert isinstance(loaded, OnnxCompiled)
    assert loaded.options == compiled.options
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(loaded(images), convolutions()(images)[0], atol=1e-5)


def test_exporting_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxgraft.export_onnx(program("llama"), tmp_path / "out")
    assert capfd.readouterr() == ("", "")
