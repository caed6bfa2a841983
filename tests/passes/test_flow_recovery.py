"""Recovery after pruning: adapters trained behind the masks, on tiny models."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import fxgraft
from fxgraft import artifact, interpreter
from fxgraft.errors import InputError, NumericError
from fxgraft.offline import Workspace, silent
from fxgraft.passes.flow import Flow, FlowCalibration, adapters
from fxgraft.passes.flow import units as layers
from fxgraft.passes.flow.settings import FlowSettings, Recovery
from fxgraft.passes.flow.stream import decode_all
from fxgraft.program import Program
from fxgraft.transform import apply
from tests import models
from tests.passes import _flow

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed"
)
SAMPLES = 64
# As much as it takes on random weights for what is learned to hold on other text.
LONG = {"steps": 60, "rank": 8, "alpha": 16, "learning_rate": 1e-2, "tokens": 512}
TRAINED = {"steps": 30, "rank": 4, "alpha": 8, "learning_rate": 5e-3, "tokens": 256}


@pytest.fixture(scope="module")
def program() -> Program:
    return _flow.capture()


@pytest.fixture(scope="module")
def encoder() -> Program:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=64)  # fmt: skip
    return fxgraft.capture(BertForMaskedLM(config).eval())


def stage(folder: Path, recovery: Mapping[str, Any] = TRAINED, **changes: Any) -> FlowCalibration:
    samples = changes.get("samples", SAMPLES)
    data = _flow.write_tokens(folder, samples=samples)
    given: dict[str, Any] = {
        "criterion": "uniform", "m": (8,), "samples": samples, "recovery": recovery
    }  # fmt: skip
    return FlowCalibration.from_config(_flow.settings(data, **(given | changes)))


def divergence(program: Program, pruned: Program) -> float:
    """KL of the next token from the dense model's, on tokens that nothing was trained on."""
    values = {"input_ids": _flow.tokens(16, 16, seed=9)}
    logs = [interpreter.run(p, values)["logits"].log_softmax(-1) for p in (program, pruned)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


@pytest.fixture(scope="module")
def both(program: Program, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts without and with recovery."""
    folder = tmp_path_factory.mktemp("recovery")
    for name, recovery in (("pruned", {}), ("recovered", LONG)):
        stage(folder, recovery, samples=512).calibrate(program, folder / name)
    return {name: folder / name for name in ("pruned", "recovered")}


def test_masks_stay_and_kept_weights_move(program: Program, both: dict[str, Path]) -> None:
    found = layers.find(program).units
    before, after = (artifact.read(both[n], "flow").tensors() for n in ("pruned", "recovered"))
    for unit in found:
        assert torch.equal(before[f"{unit.weight}.indices"], after[f"{unit.weight}.indices"])
        one, two = (decode_all(program, [unit], t)[unit.weight] for t in (before, after))
        kept = (two != 0).view(two.shape[0], -1, 8).sum(-1)
        assert torch.equal(kept, torch.full_like(kept, 4))
        assert torch.equal(one != 0, two != 0)
        assert not torch.allclose(one, two, rtol=1e-3, atol=1e-5)


def test_held_out_text_is_nearer_to_the_dense_model(
    program: Program, both: dict[str, Path]
) -> None:
    plain, trained = (
        divergence(program, apply(program, Flow(artifact=both[name]), check=False))
        for name in ("pruned", "recovered")
    )
    assert trained < 0.95 * plain


def test_the_artifact_tells_of_it_and_loads_without_peft(
    program: Program, both: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = artifact.read(both["recovered"], "flow")
    losses = stored.tensors()["recovery.losses"]
    assert losses.shape == (60,)
    recovery, loss = stored.results["recovery"], stored.results["loss"]
    assert recovery["last_step"] == float(losses[-1]) < recovery["first_step"]
    assert recovery["taken"] == (loss["recovered"] < loss["pruned"])
    assert recovery["taken"]
    plain = artifact.read(both["pruned"], "flow").results
    assert plain["recovery"] is None
    assert plain["loss"]["pruned"] == loss["pruned"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pruned = apply(program, Flow(artifact=both["recovered"]), check=False)
    assert any("after recovery" in line for line in pruned.history[-1].summary)


def test_what_is_trained_is_what_is_folded(program: Program, both: dict[str, Path]) -> None:
    """The training's own forward pass and the folded model agree to the last bit."""
    tensors = artifact.read(both["pruned"], "flow").tensors()
    units = layers.find(program).units
    made = adapters.make(units, tensors, Recovery(rank=2), seed=1)
    for index, value in enumerate(made.parameters.values()):
        torch.nn.init.normal_(value.data, generator=torch.Generator().manual_seed(index))
    for layer in made.layers:
        folded = decode_all(program, [layer.unit], layer.folded())[layer.unit.weight]
        with torch.no_grad():
            assert torch.equal(layer.weight(program), folded)
            delta = layer.adapted[0].get_delta_weight("default")
        old = layer.adapted[0].base_layer.weight
        a, b = (getattr(layer.adapted[0], f"lora_{x}")["default"].weight for x in "AB")
        torch.testing.assert_close(delta, 8.0 * b.detach() @ a.detach())
        assert torch.equal(folded, torch.where(layer.kept[0], old + delta, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_adapters_change_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    program = fxgraft.capture(_flow.llama().to(dtype))
    made = stage(tmp_path, {}).run(program, Workspace())
    units = layers.find(program).units
    fresh = adapters.make(units, made.tensors, Recovery(), seed=0)
    assert {value.dtype for value in fresh.parameters.values()} == {torch.float32}
    for layer in fresh.layers:
        for name, value in layer.folded().items():
            assert torch.equal(value, made.tensors[name])


def test_an_interrupted_training_goes_on(program: Program, tmp_path: Path) -> None:
    def stop(title: str, done: int, total: int) -> None:
        if title.startswith("recover, loss ") and done == 24:
            raise KeyboardInterrupt

    steps = stage(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        steps.calibrate(program, tmp_path / "masks", stop)
    seen: list[int] = []

    def note(title: str, done: int, total: int) -> None:
        if title.startswith("recover"):
            seen.append(done)

    steps.calibrate(program, tmp_path / "masks", note)
    assert seen == list(range(21, 31))
    steps.calibrate(program, tmp_path / "whole", silent)
    one, two = (artifact.read(tmp_path / n, "flow").tensors() for n in ("masks", "whole"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_seed_decides(program: Program, tmp_path: Path) -> None:
    short = TRAINED | {"steps": 3}
    found = [
        stage(tmp_path, short, seed=seed).run(program, Workspace()).tensors["recovery.losses"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_callers_weights_and_gradients_are_left_alone(tmp_path: Path) -> None:
    model = _flow.llama()
    program = fxgraft.capture(model)
    before = {name: value.detach().clone() for name, value in program.weights()}
    stage(tmp_path, TRAINED | {"steps": 2}).run(program, Workspace())
    for name, value in program.weights():
        assert torch.equal(value, before[name])
        assert value.grad is None


def test_a_recovery_that_does_no_good_is_not_taken(encoder: Program, tmp_path: Path) -> None:
    wild = {"steps": 2, "learning_rate": 5.0, "alpha": 64, "rank": 1}
    made = stage(tmp_path, wild, m=(4,)).run(encoder, Workspace())
    loss = made.results["loss"]
    assert loss["recovered"] > loss["pruned"]
    assert not made.results["recovery"]["taken"]
    assert any("did not lower the calibration loss" in line for line in made.summary)
    plain = stage(tmp_path, {}, m=(4,)).run(encoder, Workspace())
    assert all(torch.equal(value, made.tensors[name]) for name, value in plain.tensors.items())


def test_what_is_not_finite_is_an_error(program: Program, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match="not finite at step 1"):
        stage(tmp_path, {"steps": 2, "alpha": 1e30}).run(program, Workspace())


def pruned_share(
    program: Program, units: tuple[layers.Unit, ...], tensors: dict[str, Tensor]
) -> float:
    weights = decode_all(program, units, tensors)
    zeros = sum(int((weights[unit.weight] == 0).sum()) for unit in units)
    return zeros / sum(unit.parameters for unit in units)


@pytest.mark.parametrize("build", [models.gpt2, models.mixtral], ids=lambda build: build.__name__)
def test_stored_the_other_way_and_experts(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    program = fxgraft.capture(build())
    short = {"steps": 4, "rank": 2, "learning_rate": 1e-3, "tokens": 64}
    made = stage(tmp_path, short, m=(4,)).run(program, Workspace())
    units = layers.find(program).units
    assert pruned_share(program, units, made.tensors) == 0.5
    plain = stage(tmp_path, {}, m=(4,)).run(program, Workspace())
    assert made.results["recovery"]["taken"]
    assert all(
        torch.equal(value, made.tensors[name])
        for name, value in plain.tensors.items()
        if name.endswith(".indices")
    )


def test_padded_groups_keep_their_padding(tmp_path: Path) -> None:
    program = fxgraft.capture(_flow.llama(intermediate_size=36))
    made = stage(tmp_path, TRAINED | {"steps": 2}, pad=True).run(program, Workspace())
    units = layers.find(program).units
    plain = stage(tmp_path, {}, pad=True).run(program, Workspace())
    one, two = (decode_all(program, units, each.tensors) for each in (plain, made))
    assert all(torch.equal(one[name] != 0, two[name] != 0) for name in one)


def test_a_model_without_next_token_loss(encoder: Program, tmp_path: Path) -> None:
    made = stage(tmp_path, TRAINED, m=(4,)).run(encoder, Workspace())
    assert made.results["loss"]["recovered"] < 0.8 * made.results["loss"]["pruned"]


def test_inside_the_pass(program: Program, tmp_path: Path) -> None:
    data = _flow.write_tokens(tmp_path, samples=SAMPLES)
    step = _flow.flow(
        data, criterion="uniform", m=(8,), samples=SAMPLES, recovery=TRAINED | {"steps": 2}
    )
    folder = tmp_path / "masks"
    stage(tmp_path, TRAINED | {"steps": 2}).calibrate(program, folder)
    values = program.example(seed=3)
    direct, stored = (apply(program, s, check=False) for s in (step, Flow(artifact=folder)))
    assert torch.equal(direct(**values)[0], stored(**values)[0])


@pytest.mark.parametrize(
    ("recovery", "message"),
    [
        ({"steps": -1}, "recovery.steps"),
        ({"steps": 10, "rank": 0}, "recovery.rank"),
        ({"steps": 10, "alpha": 0}, "recovery.alpha"),
        ({"steps": 10, "learning_rate": -1.0}, "recovery.learning_rate"),
        ({"steps": 10, "tokens": 0}, "recovery.tokens"),
        ({"step": 10}, "no key 'recovery.step'; did you mean 'steps'"),
        ("yes", "recovery"),
    ],
)
def test_wrong_settings_are_refused(recovery: object, message: str) -> None:
    for kind in (Flow, FlowCalibration):
        with pytest.raises(InputError, match=message):
            kind.from_config({"recovery": recovery})


def test_without_peft_it_is_refused_before_any_work(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    seen: list[str] = []
    steps = stage(tmp_path)
    with pytest.raises(InputError, match="needs the package peft") as caught:
        steps.calibrate(program, tmp_path / "masks", lambda title, done, total: seen.append(title))
    assert "fxgraft[lora]" in caught.value.remedy
    assert not seen
    data = tmp_path / "tokens.safetensors"
    with pytest.raises(InputError, match="needs the package peft"):
        apply(program, _flow.flow(data, recovery={"steps": 1}))


def test_few_tokens_are_one_sequence(program: Program, tmp_path: Path) -> None:
    save_file({"input_ids": _flow.tokens(2, 16)}, tmp_path / "few.safetensors")
    settings: dict[str, Any] = {
        "recovery": {"steps": 1, "tokens": 1},
        "criterion": "uniform",
        "samples": 2,
    }
    given = _flow.settings(tmp_path / "few.safetensors") | settings
    made = FlowCalibration.from_config(given).run(program, Workspace())
    assert made.tensors["recovery.losses"].shape == (1,)
    assert FlowSettings(**given).recovery.rank == 8
