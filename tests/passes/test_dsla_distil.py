"""The offline stage of ``dsla``: order, training, artifact (specification §16, 25 to 28)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fxgraft import artifact
from fxgraft.errors import InputError, NumericError, SerializationError
from fxgraft.frontends.capture import capture
from fxgraft.offline import Workspace
from fxgraft.passes.dsla import Dsla, Form
from fxgraft.passes.dsla.curves import draw
from fxgraft.passes.dsla.distil import DslaDistillation
from fxgraft.passes.dsla.losses import match, separation
from fxgraft.passes.dsla.probe import probe_of, student_of
from fxgraft.passes.dsla.sensitivity import ascending, entropy, entropy_scores, query_rows
from fxgraft.passes.dsla.sites import find_sites
from fxgraft.passes.dsla.train import Recipe, train
from fxgraft.program import Program
from fxgraft.transform import apply
from tests import models

LENGTH = 32
FORM = Form(adapt="heads", half_lives=((16.0, 64.0), (2.0, 16.0)))


@pytest.fixture(scope="module")
def llama() -> Program:
    return capture(models.llama())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tokens.safetensors"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, models.VOCABULARY, (20 * LENGTH + 5,), generator=generator)
    save_file({"input_ids": ids}, path)
    return path


def stage(data: Path, **changes: Any) -> DslaDistillation:
    values: dict[str, Any] = {
        "data": (data,), "length": LENGTH, "held_out": 2, "count": 2, "form": FORM,
        "tokens": 12 * 2 * LENGTH, "batch": 2, **changes,
    }  # fmt: skip
    return DslaDistillation(**values)


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "steps": 20, "batch": 4, "learning_rate": 1e-2, "weight_decay": 0.01, "match": "mse",
        "from_teacher": False, "separation": 0.01, "separation_kind": "centred", "logits": 0.0,
        "plateau": 0, "seed": 0, **changes,
    }  # fmt: skip
    return Recipe(**values)


@pytest.fixture(scope="module")
def made(llama: Program, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "artifact"
    stage(data).calibrate(llama, folder)
    return folder


def test_entropy_of_even_and_of_single_attention() -> None:
    key, rows = torch.zeros(1, 1, 20, 4), torch.tensor([4, 19])
    even = entropy(torch.randn(1, 2, 20, 4), key, 1.0, rows)
    wanted = torch.log(rows.float() + 1).expand(1, 2, 2)
    torch.testing.assert_close(even, wanted)
    key[0, 0, 2] = 100.0
    single = entropy(torch.ones(1, 2, 20, 4), key, 1.0, rows)
    torch.testing.assert_close(single, torch.zeros(1, 2, 2), atol=1e-6, rtol=0)


def test_entropy_leaves_padding_out_and_equals_the_full_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 24, 8, generator=generator)
    key = torch.randn(2, 2, 24, 8, generator=generator)
    rows, mask = query_rows(24), torch.ones(2, 24, dtype=torch.bool)
    mask[:, :5] = False
    found = entropy(query, key, 0.3, rows, mask)
    key[:, :, :5] = 77.0
    torch.testing.assert_close(entropy(query, key, 0.3, rows, mask), found)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    hidden = torch.ones(24, 24, dtype=torch.bool).triu(1) | ~mask[0]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)[:, :, rows]
    full = -torch.xlogy(weights, weights).sum(-1)
    torch.testing.assert_close(found, full, atol=1e-5, rtol=1e-5)


def test_orders_rise_and_later_layers_win_ties() -> None:
    assert ascending({0: 0.5, 1: 0.2, 2: 0.5, 3: 0.9}) == [1, 2, 0, 3]
    with pytest.raises(ValueError, match="NaN"):
        ascending({0: math.nan})


def test_entropy_scores_are_shares_and_repeat(llama: Program) -> None:
    sites, _ = find_sites(llama)
    ids = torch.randint(3, 100, (6, LENGTH), generator=torch.Generator().manual_seed(1))
    first, second = (entropy_scores(llama, sites, ids) for _ in range(2))
    assert first == second
    assert all(0 < score <= 1 for score in first.values())


def test_losses_are_zero_for_equals_and_separation_falls_for_opposites() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert float(match(x, x, "mse")) == 0
    assert float(match(x, x, "kl")) == pytest.approx(0, abs=1e-6)
    assert float(match(0 * x, x, "mse")) == pytest.approx(1)
    slopes = torch.linspace(-2, 2, 8)
    alike = torch.stack([slopes, slopes]).expand(1, 1, 1, 2, 8)
    apart = torch.stack([slopes, -slopes]).expand(1, 1, 1, 2, 8)
    for kind in ("centred", "raw"):
        assert float(separation(apart, 16.0, None, kind)) < float(
            separation(alike, 16.0, None, kind)
        )
    far = torch.stack([slopes + 9, slopes]).expand(1, 1, 1, 2, 8)
    assert float(separation(far, 16.0, None, "hinge")) == 0
    assert float(separation(alike, 16.0, None, "hinge")) == pytest.approx(math.log(16))


def test_a_stage_lowers_its_loss_and_separates_its_gates(llama: Program) -> None:
    sites, _ = find_sites(llama)
    ids = torch.randint(3, 100, (32, LENGTH), generator=torch.Generator().manual_seed(1))
    new = [(0, FORM.initial(sites[0], 64))]
    with_term = train(llama, FORM, (), new, ids, recipe(steps=120, separation=0.3))
    without = train(llama, FORM, (), new, ids, recipe(steps=120, separation=0.0))
    for made in (with_term, without):
        assert float(made.losses[-10:].mean()) < 0.7 * float(made.losses[:3].mean())
    assert float(with_term.separations[-1]) < float(without.separations[-1]) - 0.02


def test_one_converted_layer_alone_has_a_gradient(llama: Program) -> None:
    sites, _ = find_sites(llama)
    values = {n: v.requires_grad_() for n, v in FORM.initial(sites[1], 64).items()}
    probe = probe_of(llama, FORM, (), [(1, FORM.initial(sites[1], 64))])
    [seen], _ = probe(torch.tensor([[5, 6, 7, 8, 9, 3]]), [values])
    match(seen.student, seen.teacher, "mse").backward()
    assert all(v.grad is not None and float(v.grad.abs().sum()) > 0 for v in values.values())
    assert not any(weight.grad is not None for _, weight in probe.program.weights())


@pytest.mark.parametrize(
    "changes",
    [{"match": "kl"}, {"from_teacher": True}, {"logits": 0.5}, {"separation_kind": "raw"}],
)
def test_other_recipes_train_too(llama: Program, changes: dict[str, Any]) -> None:
    sites, _ = find_sites(llama)
    ids = torch.randint(3, 100, (8, LENGTH), generator=torch.Generator().manual_seed(1))
    before = [(2, FORM.initial(sites[2], 64))]
    new = [(0, FORM.initial(sites[0], 64))]
    made = train(llama, FORM, before, new, ids, recipe(**changes))
    assert float(made.losses[-5:].mean()) < float(made.losses[0])


def test_a_loss_that_is_not_finite(llama: Program) -> None:
    sites, _ = find_sites(llama)
    new = [(0, {n: v * math.inf for n, v in FORM.initial(sites[0], 64).items()})]
    ids = torch.randint(3, 100, (8, LENGTH))
    with pytest.raises(NumericError, match="not finite"):
        train(llama, FORM, (), new, ids, recipe(steps=2))


def test_a_plateau_ends_a_stage(llama: Program) -> None:
    sites, _ = find_sites(llama)
    ids = torch.randint(3, 100, (8, LENGTH), generator=torch.Generator().manual_seed(1))
    new = [(0, FORM.initial(sites[0], 64))]
    made = train(llama, FORM, (), new, ids, recipe(steps=60, learning_rate=1e-9, plateau=4))
    assert len(made.losses) < 60


def test_the_artifact_and_each_first_part_of_its_stages(llama: Program, made: Path) -> None:
    found = artifact.read(made, "dsla")
    assert sorted(found.results["order"]) == [0, 1, 2]
    assert found.results["scores"] == sorted(found.results["scores"])
    layers = [one["layer"] for one in found.results["stages"]]
    assert layers == found.results["order"][:2]
    assert (made / "losses.svg").read_text().count("<polyline") == 2
    ids = torch.tensor([[5, 6, 7, 8, 9, 3]])
    tensors = found.tensors()
    trained: list[tuple[int, dict[str, Tensor]]] = []
    for count, layer in enumerate(layers, start=1):
        prefix = f"stage_{count - 1:02d}."
        own = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        trained.append((layer, own))
        student = student_of(llama, FORM, trained)
        loaded = apply(llama, Dsla(artifact=made, count=count))
        assert torch.equal(loaded(ids)[0], student(ids)[0])
    assert not apply(llama, Dsla(artifact=made)).diff(apply(llama, Dsla(artifact=made, count=2)))


def test_later_stages_leave_earlier_ones_alone(llama: Program, data: Path, made: Path) -> None:
    work = Workspace()
    one = stage(data, count=1).run(llama, work).tensors
    both = artifact.read(made, "dsla").tensors()
    assert all(torch.equal(value, both[name]) for name, value in one.items())


def test_an_interrupted_run_ends_as_it_would_have(
    llama: Program, data: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def progress(title: str, at: int, total: int) -> None:
        if title.startswith("stage 2") and at == 5 and not done:
            done.append(title)
            raise KeyboardInterrupt

    target = tmp_path / "artifact"
    with pytest.raises(KeyboardInterrupt):
        stage(data).calibrate(llama, target, progress)
    parts = tmp_path / ".artifact.calibrating"
    assert (parts / "stage_00.safetensors").is_file()
    assert not (parts / "stage_01.safetensors").exists()
    written, _ = stage(data).calibrate(llama, target, progress)
    wanted = artifact.read(made, "dsla").tensors()
    found = written.tensors()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not parts.exists()


def test_a_half_written_stage_is_found(llama: Program, data: Path, tmp_path: Path) -> None:
    def stop(title: str, at: int, total: int) -> None:
        if title.startswith("stage 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(data).calibrate(llama, tmp_path / "artifact", stop)
    part = tmp_path / ".artifact.calibrating" / "stage_00.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(SerializationError, match="stage_00"):
        stage(data).calibrate(llama, tmp_path / "artifact")


def test_a_damaged_artifact_and_one_of_another_model(made: Path, tmp_path: Path) -> None:
    other = capture(models.llama(num_attention_heads=4, num_key_value_heads=4))
    with pytest.raises(InputError, match="another model"):
        apply(other, Dsla(artifact=made))
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in made.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = copy / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(SerializationError, match="damaged"):
        apply(other, Dsla(artifact=copy))


def test_stages_that_were_not_trained(llama: Program, made: Path) -> None:
    [untrained] = {0, 1, 2} - {
        one["layer"]
        for one in json.loads((made / "artifact.json").read_text())["results"]["stages"]
    }
    with pytest.raises(InputError, match="no stage for it"):
        apply(llama, Dsla(artifact=made, layers=(untrained,)))
    with pytest.raises(InputError, match="asks for 3 layers"):
        apply(llama, Dsla(artifact=made, count=3))


@pytest.mark.parametrize("order", ["loss", "random", "last", (1, 0, 2)])
def test_orders(llama: Program, data: Path, order: Any) -> None:
    changes: dict[str, Any] = {"order": order, "trial_steps": 1, "tokens": 2 * LENGTH, "count": 1}
    found = stage(data, **changes).run(llama, Workspace()).results
    turned = stage(data, **changes, reverse=True).run(llama, Workspace()).results
    assert sorted(found["order"]) == [0, 1, 2]
    assert turned["order"] == found["order"][::-1]
    if isinstance(order, tuple):
        assert found["order"] == list(order)
    if order == "last":
        assert found["order"] == [2, 1, 0]


def test_joint_training_and_text_that_the_teacher_writes(llama: Program) -> None:
    values: dict[str, Any] = {
        "generated": 6, "length": 12, "held_out": 2, "fraction": 0.7, "joint": True,
        "tokens": 48, "batch": 2, "form": FORM,
    }  # fmt: skip
    found = DslaDistillation(**values).run(llama, Workspace())
    assert [one["steps"] for one in found.results["stages"]] == [2, 2]
    assert len(found.summary) == 3


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"length": 4096}, "no sequence of 4096"),
        ({"held_out": 20}, "20 are held out"),
        ({"order": (0, 9)}, r"layers \[9\]"),
        ({"count": 4}, "4 layers are to be trained"),
    ],
)
def test_wrong_settings(llama: Program, data: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        stage(data, **changes).run(llama, Workspace())


def test_wrong_data(llama: Program, tmp_path: Path) -> None:
    save_file({"input_ids": torch.tensor([5, 500] * 40)}, tmp_path / "large.safetensors")
    with pytest.raises(InputError, match="token ids up to 500"):
        stage(tmp_path / "large.safetensors").run(llama, Workspace())
    save_file({"ids": torch.tensor([5])}, tmp_path / "named.safetensors")
    with pytest.raises(InputError, match="input_ids"):
        stage(tmp_path / "named.safetensors").run(llama, Workspace())
    with pytest.raises(SerializationError, match="missing"):
        stage(tmp_path / "missing.safetensors").run(llama, Workspace())
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(InputError, match="tokenizer is not known"):
        stage(tmp_path / "text.txt").run(llama, Workspace())


def test_curves_have_one_line_each() -> None:
    text = draw({"layer 1": torch.linspace(2, 1, 500), "layer <2>": torch.tensor([0.5])})
    assert text.count("<polyline") == 2
    assert "layer &lt;2&gt;" in text
