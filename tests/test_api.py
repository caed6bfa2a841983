"""``compile``, ``load`` and what they return, from a model to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft import auto
from fxgraft.backend import backend_names, find_backend
from fxgraft.backends.torch import backend as torch_backend
from fxgraft.check import relative_error
from fxgraft.errors import InputError, LoweringError, SerializationError
from fxgraft.passes.optimize import Optimize
from fxgraft.passes.prune_heads import PruneHeads
from fxgraft.pipeline import PassSpec, Pipeline
from tests import models

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return models.llama()


@pytest.fixture(scope="module")
def program(model: nn.Module) -> fxgraft.Program:
    return fxgraft.capture(model)


@pytest.fixture(scope="module")
def input_ids() -> Tensor:
    return torch.randint(3, models.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return cast(Any, model)(input_ids, use_cache=False).logits


@pytest.fixture(scope="module")
def tokens(model: nn.Module, input_ids: Tensor) -> Tensor:
    """What transformers itself generates."""
    greedy = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    mask = torch.ones_like(input_ids)
    return cast(Any, model).generate(input_ids, attention_mask=mask, **greedy)


@pytest.fixture(scope="module")
def compiled(program: fxgraft.Program) -> fxgraft.Compiled:
    return fxgraft.compile(program, ["optimize"], backend="torch")


def test_everything_that_is_documented_is_there() -> None:
    for name in fxgraft.__all__:
        assert getattr(fxgraft, name).__doc__, name
    assert fxgraft.__version__


def test_a_model_is_compiled_with_a_pass_and_generates(
    model: nn.Module, input_ids: Tensor, logits: Tensor, tokens: Tensor
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[tuple[str, int, int]] = []

    def progress(name: str, index: int, count: int) -> None:
        seen.append((name, index, count))

    compiled = fxgraft.compile(model, [Optimize()], backend="torch", progress=progress)
    assert seen == [("optimize", 0, 1)]
    assert relative_error(compiled(input_ids).logits, logits) < TOLERANCE
    assert torch.equal(compiled.generate(input_ids, max_new_tokens=5), tokens)
    assert compiled.state_problem is None
    assert compiled.backend == "torch"
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


PRUNE: dict[str, dict[str, object]] = {"prune_heads": {"sparsity": 0.25, "scope": "per_layer"}}


@pytest.mark.parametrize(
    "passes",
    [
        [Optimize(), PruneHeads(sparsity=0.25, scope="per_layer")],
        ["optimize", PRUNE],
        [{"optimize": None}, PRUNE],
        Pipeline((Optimize(), PruneHeads(sparsity=0.25, scope="per_layer"))),
    ],
    ids=["instances", "name and mapping", "mappings", "pipeline"],
)
def test_passes_are_given_in_every_form(
    program: fxgraft.Program, passes: Sequence[PassSpec] | Pipeline
) -> None:
    result = fxgraft.compile(program, passes, backend="torch", check=False).program
    assert [record.name for record in result.history] == ["optimize", "prune_heads"]
    assert result.history[1].config["sparsity"] == 0.25
    assert result.history[1].config["scope"] == "per_layer"
    assert result.count_parameters() < program.count_parameters()
    assert not program.history


def test_passes_from_a_file_equal_those_from_python(
    program: fxgraft.Program, input_ids: Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        "passes:\n  - optimize\n  - prune_heads: {sparsity: 0.25, scope: per_layer}\n"
        "backend: torch\n"
    )
    from_file = fxgraft.compile(program, file, backend="torch")
    from_python = fxgraft.compile(program, ["optimize", PRUNE], backend="torch")
    assert not from_file.program.diff(from_python.program)
    assert torch.equal(from_file(input_ids).logits, from_python(input_ids).logits)
    assert fxgraft.compile(program, str(file), backend="torch").program.history[1].error is not None


def test_history_tells_what_each_pass_did(program: fxgraft.Program) -> None:
    compiled = fxgraft.compile(program, ["optimize", PRUNE], backend="torch")
    optimize, prune = compiled.program.history
    assert optimize.effect == "exact"
    assert optimize.error is not None
    assert optimize.error < 1e-5
    assert optimize.after.nodes < optimize.before.nodes
    assert prune.before == optimize.after
    assert prune.after.parameters < prune.before.parameters
    assert prune.after.flops < prune.before.flops
    assert "3 of 12 query heads removed" in prune.summary[0]
    assert prune.diff
    assert str(compiled.program.diff(program))


def test_the_check_can_be_left_out(program: fxgraft.Program) -> None:
    compiled = fxgraft.compile(program, ["optimize"], backend="torch", check=False)
    assert [record.error for record in compiled.program.history] == [None]


def test_named_outputs_are_read_by_attribute_key_and_position(
    compiled: fxgraft.Compiled, input_ids: Tensor
) -> None:
    outputs = compiled(input_ids)
    assert isinstance(outputs, fxgraft.Outputs)
    assert list(outputs) == ["logits"]
    assert outputs["logits"] is outputs.logits is outputs.to_tuple()[0]
    with pytest.raises(AttributeError, match="no output 'loss'; there are: logits"):
        outputs.loss  # noqa: B018


def test_inputs_are_given_by_position_or_name(
    compiled: fxgraft.Compiled, input_ids: Tensor, model: nn.Module
) -> None:
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    by_name = compiled(attention_mask=mask, input_ids=input_ids).logits
    assert torch.equal(compiled(input_ids, mask).logits, by_name)
    assert torch.equal(compiled(input_ids.int(), mask.bool(), position_ids=None).logits, by_name)
    with torch.no_grad():
        expected = cast(Any, model)(input_ids, attention_mask=mask, use_cache=False).logits
    seen = mask.bool()
    assert relative_error(by_name[seen], expected[seen]) < TOLERANCE


class Returning(nn.Module):
    """Returns what it is told to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        kinds = {"tensor": y, "tuple": (y, x), "mapping": {"y": y, "deep": {"x": [x, y]}}}
        return kinds[self.kind]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping"])
def test_results_are_of_the_models_own_kind(kind: str) -> None:
    model = Returning(kind)
    compiled = fxgraft.compile(model, example=(torch.randn(3, 4),))
    assert compiled.backend == "torch"
    x = torch.randn(5, 4)
    result, expected = compiled(x), model(x)
    if kind == "tensor":
        assert torch.equal(result, expected)
        return
    if kind == "tuple":
        assert isinstance(result, tuple)
        first, second = cast("tuple[Tensor, Tensor]", result)
        assert torch.equal(first, expected[0])
        assert torch.equal(second, x)
        return
    assert list(result) == ["y", "deep.x.0", "deep.x.1"]
    assert torch.equal(result.y, expected["y"])
    assert torch.equal(result["deep.x.0"], x)


def test_generation_without_state_says_why() -> None:
    """A bidirectional model recomputes; there is nothing to keep."""
    model = models.llama(num_hidden_layers=1)
    program = fxgraft.capture(model)
    for node in program.graph.find_nodes(
        op="call_function", target=torch.ops.fxgraft.attention.default
    ):
        node.update_kwarg("is_causal", False)
    program.graph_module.recompile()
    compiled = fxgraft.compile(program, backend="torch")
    assert compiled.generate([[5, 6, 7]], max_new_tokens=3).shape[0] == 1
    assert "self_attn" in (compiled.state_problem or "")
    assert any("recomputes" in note for note in compiled.report().notes)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor takes long; without a C++ compiler it cannot be used. Nor is there a GPU."""
    monkeypatch.setattr(torch_backend, "inductor_problem", lambda: "no C++ compiler")
    monkeypatch.setattr(type(find_backend("triton")), "available", lambda _: "no GPU")


@pytest.mark.usefixtures("no_compiler")
def test_auto_picks_the_fastest_that_agrees(
    program: fxgraft.Program, input_ids: Tensor, tokens: Tensor
) -> None:
    compiled = fxgraft.compile(program, ["optimize"])
    trials = cast("list[auto.Trial]", compiled.trials)
    names = [(trial.backend, trial.options.get("mode")) for trial in trials]
    assert names == [("torch", "eager"), ("onnx", None), ("torch", "inductor")]
    assert "no C++ compiler" in trials[2].problem
    assert trials[2].milliseconds is None
    accepted = {t.backend: t.milliseconds for t in trials if not t.problem and t.milliseconds}
    assert "torch" in accepted
    assert compiled.backend == min(accepted, key=lambda name: accepted[name])
    assert torch.equal(compiled.generate(input_ids, max_new_tokens=5), tokens)


class WrongBackend(fxgraft.Backend):
    """Runs another model than it is given."""

    name = "onnx"

    def available(self) -> str | None:
        return None

    def lower(self, program: fxgraft.Program, **options: Any) -> fxgraft.Compiled:
        other = program.copy()
        head = program.weight("lm_head.weight").detach()
        other.set_weight("lm_head.weight", nn.Parameter(head.flip(0)))
        return find_backend("torch").lower(other)


@pytest.mark.usefixtures("no_compiler")
def test_auto_refuses_a_backend_that_disagrees(
    program: fxgraft.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> fxgraft.Backend:
        return WrongBackend() if name == "onnx" else find_backend(name)

    monkeypatch.setattr(auto, "find_backend", find)
    compiled = fxgraft.compile(program)
    trials = cast("list[auto.Trial]", compiled.trials)
    problems = {trial.backend: trial.problem for trial in trials[:2]}
    assert problems["torch"] == ""
    assert "differ from eager torch's" in problems["onnx"]
    assert compiled.program is program


class StandIn(fxgraft.Backend):
    """Takes the place of Triton on a machine without a GPU."""

    name = "triton"

    def available(self) -> str | None:
        return None

    def lower(self, program: fxgraft.Program, **options: Any) -> fxgraft.Compiled:
        return find_backend("torch").lower(program)


def test_auto_tries_triton_where_there_is_a_gpu(
    program: fxgraft.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> fxgraft.Backend:
        return StandIn() if name == "triton" else find_backend(name)

    monkeypatch.setattr(auto, "find_backend", find)
    trials = cast("list[auto.Trial]", fxgraft.compile(program).trials)
    assert [(trial.backend, trial.problem) for trial in trials] == [("torch", ""), ("triton", "")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_auto_picks_triton_on_a_gpu(
    program: fxgraft.Program, input_ids: Tensor, tokens: Tensor
) -> None:
    compiled = fxgraft.compile(program, ["optimize"])
    assert compiled.backend == "triton"
    assert torch.equal(compiled.generate(input_ids, max_new_tokens=5), tokens)


@pytest.mark.slow
def test_auto_tries_inductor_where_it_can(program: fxgraft.Program, tokens: Tensor) -> None:
    if torch_backend.inductor_problem() is not None:
        pytest.skip("no C++ compiler")
    compiled = fxgraft.compile(program)
    trials = cast("list[auto.Trial]", compiled.trials)
    assert trials[2].problem == ""
    assert trials[2].milliseconds is not None
    accepted = [trial for trial in trials if not trial.problem]
    best = min(accepted, key=lambda trial: trial.milliseconds or 0.0)
    assert (compiled.backend, compiled.options) == (
        best.backend,
        {**compiled.options, **best.options},
    )


def test_options_need_a_backend_and_are_refused_before_anything_runs(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(backend: fxgraft.Backend) -> str:
        return "onnxruntime is not installed"

    monkeypatch.delattr("fxgraft.api.capture")
    with pytest.raises(InputError, match=r"options \['mode'\] were given with backend 'auto'"):
        fxgraft.compile(model, options={"mode": "eager"})
    with pytest.raises(InputError, match="no backend 'tpu'") as caught:
        fxgraft.compile(model, backend="tpu")
    assert ", ".join(["auto", *backend_names()]) in caught.value.remedy
    backend = find_backend("onnx")
    monkeypatch.setattr(type(backend), "available", missing)
    with pytest.raises(LoweringError, match="onnxruntime is not installed"):
        fxgraft.compile(model, backend="onnx")


def test_a_saved_program_comes_back(
    program: fxgraft.Program, input_ids: Tensor, tmp_path: Path
) -> None:
    loaded = fxgraft.load(program.save(tmp_path / "saved"))
    assert isinstance(loaded, fxgraft.Program)
    assert torch.equal(loaded(input_ids)[0], program(input_ids)[0])
    assert loaded.origin == program.origin
    assert not loaded.diff(program)


@pytest.mark.parametrize(("backend", "options"), [("torch", {"mode": "eager"}), ("onnx", {})])
def test_a_saved_compiled_model_comes_back(
    program: fxgraft.Program,
    input_ids: Tensor,
    tokens: Tensor,
    tmp_path: Path,
    backend: str,
    options: dict[str, Any],
) -> None:
    compiled = fxgraft.compile(program, ["optimize"], backend=backend, options=options)
    loaded = fxgraft.load(compiled.save(tmp_path / "saved"))
    assert isinstance(loaded, fxgraft.Compiled)
    assert (loaded.backend, loaded.options) == (compiled.backend, compiled.options)
    assert torch.equal(loaded(input_ids).logits, compiled(input_ids).logits)
    assert torch.equal(loaded.generate(input_ids, max_new_tokens=5), tokens)
    assert loaded.program.history == compiled.program.history
    assert "backend" not in loaded.program.origin
    assert isinstance(fxgraft.load(loaded.program.save(tmp_path / "again")), fxgraft.Program)


@pytest.mark.parametrize(
    ("saved", "error", "message"),
    [
        ({"name": "tpu", "options": {}}, InputError, "no backend 'tpu'"),
        ({"name": "torch", "options": [1]}, InputError, "'options' is a list"),
        ({"name": "torch", "options": {"mode": "x"}}, InputError, "'mode'"),
        ({"name": "torch"}, SerializationError, "names no backend and options"),
        ("torch", SerializationError, "names no backend and options"),
    ],
)
def test_a_saved_model_of_an_odd_backend(
    program: fxgraft.Program,
    tmp_path: Path,
    saved: object,
    error: type[fxgraft.Error],
    message: str,
) -> None:
    odd = program.copy()
    odd.origin["backend"] = saved
    odd.save(tmp_path / "saved")
    with pytest.raises(error, match=message) as caught:
        fxgraft.load(tmp_path / "saved")
    assert caught.value.remedy


def test_export_writes_a_folder_for_onnxruntime(
    compiled: fxgraft.Compiled, input_ids: Tensor, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = fxgraft.export_onnx(compiled, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(folder / "prefill.onnx")
    assert "input_ids" in {value.name for value in session.get_inputs()}
    assert (folder / "decode.onnx").is_file()
    with pytest.raises(InputError, match="'model' is a Linear"):
        fxgraft.export_onnx(cast(Any, nn.Linear(2, 2)), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
