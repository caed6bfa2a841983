"""``flow``: the pass and its offline stage on tiny models (specification, sections 13 and 14)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

import fxgraft
from fxgraft import artifact, interpreter, placement
from fxgraft import graph as graphs
from fxgraft.calibration import token_losses
from fxgraft.errors import ContractError, InputError, SerializationError
from fxgraft.offline import Workspace
from fxgraft.passes.flow import Flow, FlowCalibration
from fxgraft.passes.flow import units as layers
from fxgraft.passes.flow.patterns import Pattern
from fxgraft.passes.flow.scores import group_mask
from fxgraft.passes.flow.sensitivity import relative
from fxgraft.passes.flow.stream import decode_all, evaluate, measure_all
from fxgraft.passes.flow.study import by_hessian, by_score, masked
from fxgraft.program import Program
from fxgraft.state import insert_state
from fxgraft.transform import apply
from fxgraft.weight_products import weight_products
from tests import models
from tests.core.test_state import inputs_of, run_steps
from tests.passes import _flow

NM = torch.ops.fxgraft.nm_linear.default


@pytest.fixture(scope="module")
def program() -> Program:
    return _flow.capture()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return _flow.write_tokens(tmp_path)


def sparse_nodes(program: Program) -> list[torch.fx.Node]:
    return list(program.graph.find_nodes(op="call_function", target=NM))


def dense_weights(program: Program) -> list[Tensor]:
    """The matrices behind every packed layer."""
    products = weight_products(program)
    return [products[node].matrices(program)[0] for node in sparse_nodes(program)]


def masked_logits(model: nn.Module, pruned: Program, values: dict[str, Tensor]) -> Tensor:
    """Logits of the original model with the pruned weights put in."""
    weights = iter(dense_weights(pruned))
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            module.weight.data = next(weights)
    with torch.no_grad():
        logits = cast(Any, model)(**values, use_cache=False).logits
    model.load_state_dict(saved)
    return logits


@pytest.mark.parametrize("criterion", ["loss", "flow", "figure", "uniform"])
@pytest.mark.parametrize("granularity", ["projection", "block"])
def test_every_group_keeps_n_and_the_budget_is_met(
    program: Program, data: Path, criterion: str, granularity: str
) -> None:
    step = _flow.flow(data, criterion=criterion, granularity=granularity)
    pruned = apply(program, step, check=False)
    nodes = sparse_nodes(pruned)
    total = zeros = 0
    for node, weight in zip(nodes, dense_weights(pruned), strict=True):
        n, m = node.kwargs["n"], node.kwargs["m"]
        kept = (weight != 0).view(weight.shape[0], -1, cast(int, m)).sum(-1)
        assert torch.equal(kept, torch.full_like(kept, cast(int, n)))
        total, zeros = total + weight.numel(), zeros + int((weight == 0).sum())
    parameters = sum(unit.parameters for unit in layers.find(program).units)
    assert zeros == parameters / 2
    assert "sparsity 0.5, as asked" in pruned.history[-1].summary[0]


def test_the_result_equals_the_original_with_masked_weights(data: Path) -> None:
    model = _flow.llama()
    program = fxgraft.capture(model)
    pruned = apply(program, _flow.flow(data, criterion="uniform"))
    values = inputs_of(program, batch=3)
    seen = values["attention_mask"].bool()
    wanted = masked_logits(model, pruned, values)
    torch.testing.assert_close(pruned(**values)[0][seen], wanted[seen], atol=1e-5, rtol=1e-4)
    assert pruned.count_bytes() < program.count_bytes()


def test_uniform_is_wandas_mask(program: Program, data: Path) -> None:
    """The first block sees the dense model's inputs, so its masks follow from hooks on it."""
    model = _flow.llama()
    pruned = apply(program, _flow.flow(data, criterion="uniform", m=(8,)), check=False)
    seen: list[Tensor] = []
    first = cast(Any, model).model.layers[0].self_attn.q_proj
    handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        cast(Any, model)(load_file(data)["input_ids"])
    handle.remove()
    squares = seen[0].square().sum(1).mean(0)
    kept = group_mask(first.weight.abs() * squares.sqrt(), Pattern(4, 8))
    assert torch.equal(dense_weights(pruned)[0], torch.where(kept, first.weight, 0))


@pytest.mark.parametrize("changes", [{"budget": 0.0}, {"budget": 0.0, "m": (8,), "n": (8,)}])
def test_neutral_is_the_identity(program: Program, changes: dict[str, Any]) -> None:
    same = apply(program, Flow(**changes))
    values = program.example(seed=1)
    assert torch.equal(same(**values)[0], program(**values)[0])
    assert not same.diff(program)


@pytest.mark.parametrize("criterion", ["loss", "flow", "figure"])
def test_the_guard_takes_uniform_unless_the_choice_is_better(
    program: Program, tmp_path: Path, criterion: str
) -> None:
    folder = _flow.calibrate(program, tmp_path, criterion=criterion)
    results = artifact.read(folder, "flow").results
    loss = results["loss"]
    assert loss["pruned"] <= loss["uniform"]
    assert (results["chosen"] == "uniform") == (loss["pruned"] == loss["uniform"])
    assert bool(results["guard"]) == (results["chosen"] == "uniform")


def test_where_no_uniform_pattern_has_the_sparsity_the_report_says_so(
    program: Program, tmp_path: Path
) -> None:
    folder = _flow.calibrate(program, tmp_path, budget=0.55, m=(8,))
    results = artifact.read(folder, "flow").results
    assert "no single N:M has this sparsity: the nearest above is 0.625" in results["guard"]
    assert 0.55 <= results["sparsity"] < 0.551


def test_loss_finds_the_layer_that_does_nothing() -> None:
    """A block whose output is scaled to almost nothing is pruned hardest."""
    model = _flow.llama()
    block = cast(Any, model).model.layers[1]
    with torch.no_grad():
        block.mlp.down_proj.weight.mul_(1e-4)
    found = _flow.study(fxgraft.capture(model), m=(8,))
    _, assignment = found.select(Workspace())
    chosen = {unit.weight: pattern for unit, pattern in assignment.items()}
    assert chosen["model.layers.1.mlp.down_proj.weight"] == Pattern(1, 8)
    assert chosen["model.layers.1.mlp.up_proj.weight"] == Pattern(1, 8)


def test_estimated_rises_agree_with_measured_ones(program: Program) -> None:
    """Without next-token loss, where the estimate has no first-order term to leave out."""
    found = _flow.study(program, m=(8,))
    found.objective.is_causal = False
    measure_all(program, [], found.objective, Workspace(), lambda unit, statistics: None)
    rises = found.estimate(Workspace())
    estimates: list[float] = []
    measured: list[float] = []
    for unit in found.found.units:
        weights = unit.read(program.weight(unit.weight))
        pruned = masked(unit, weights, found.scores(unit), Pattern(6, 8))
        one = {f"{unit.weight}.dense": pruned.weights}
        measured.append(evaluate(program, [unit], one, found.objective))
        estimates.append(float(relative(rises[unit], 8)[6]))
    ranks = torch.stack([torch.tensor(v).argsort().argsort() for v in (estimates, measured)])
    assert float(torch.corrcoef(ranks.double())[0, 1]) > 0.8


def test_rises_are_the_second_derivative_of_the_loss(program: Program) -> None:
    """½ Σ (g · δ)² from autograd over the whole model at once."""
    found = _flow.study(program, m=(4,))
    rises = found.estimate(Workspace())
    unit = found.found.units[-1]
    batch = found.objective.batches[0]
    kept: dict[str, Tensor] = {}
    with torch.enable_grad():
        kept = _run_with_gradients(program, batch, unit.node)
        loss = token_losses(kept["logits"], batch["input_ids"]).sum()
        (slope,) = torch.autograd.grad(loss, kept["output"])
    weight = program.weight(unit.weight)
    mask = group_mask(found.scores(unit)[0], Pattern(1, 4))
    change = -kept["input"] @ torch.where(mask, 0, weight).T
    expected = 0.5 * (change * slope).sum(-1).double().square().sum()
    torch.testing.assert_close(rises[unit].by_width[4][1], expected.detach(), rtol=1e-4, atol=0)


def _run_with_gradients(
    program: Program, batch: dict[str, Tensor], node: torch.fx.Node
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n is node:
                found["output"] = value.requires_grad_()
                found["input"] = self.env[node.all_input_nodes[0]]
            return value

    found["logits"] = Watch(program.graph_module).run(*program.bind(**batch))[0]
    return found


@pytest.mark.parametrize("pattern", [(8,), (16,)])
def test_the_update_is_never_worse_than_the_mask(program: Program, pattern: tuple[int]) -> None:
    found = _flow.study(program, m=pattern, criterion="uniform", update="hessian")
    _, assignment = found.select(Workspace())
    runs = [
        found.run(make(assignment), name, Workspace(), with_products=True)
        for name, make in (("mask", by_score), ("update", by_hessian))
    ]
    first = [unit for unit in found.found.units if unit.layer == 0]
    x: dict[str, list[Tensor]] = {unit.weight: [] for unit in first}
    for batch in found.objective.batches:
        kept: dict[str, Any] = {}
        interpreter.run(program, batch, kept=kept)
        for unit in first:
            x[unit.weight].append(kept[unit.source.name].flatten(0, -2))
    for unit in first:
        dense, rows = program.weight(unit.weight), torch.cat(x[unit.weight])
        plain, updated = (
            (rows @ (dense - decode_all(program, [unit], run.tensors)[unit.weight]).T)
            .square().sum(0) for run in runs
        )  # fmt: skip
        assert bool((updated <= plain * (1 + 1e-4)).all())
        assert float(updated.sum()) < float(plain.sum())
    assert runs[1].loss < runs[0].loss * 1.05


def test_scaling_changes_no_mask(program: Program, data: Path) -> None:
    """Of the weights of a whole block, and so of its activations."""
    scaled = program.copy()
    for unit in layers.find(program).units:
        if unit.layer == 0 and "_proj" in unit.weight and "o_proj" not in unit.weight:
            scaled.set_weight(unit.weight, nn.Parameter(program.weight(unit.weight) * 4))
    one, two = (_flow.study(p, m=(8,), criterion="uniform") for p in (program, scaled))
    for first, second in zip(one.found.units[:3], two.found.units[:3], strict=True):
        masks = [group_mask(s.scores(u), Pattern(3, 8)) for s, u in ((one, first), (two, second))]
        assert torch.equal(masks[0], masks[1])


def test_the_same_seed_gives_the_same_file(program: Program, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    folders = [_flow.calibrate(program, tmp_path / name) for name in ("one", "two")]
    one, two = (load_file(folder / artifact.TENSORS) for folder in folders)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_artifact_is_applied_without_data(program: Program, tmp_path: Path) -> None:
    folder = _flow.calibrate(program, tmp_path)
    direct = apply(program, _flow.flow(tmp_path / "tokens.safetensors"), check=False)
    pruned = apply(program, Flow(artifact=folder))
    values = program.example(seed=3)
    assert torch.equal(pruned(**values)[0], direct(**values)[0])
    assert (folder / "picture.svg").read_text().count("<rect") > 21
    assert not list(tmp_path.glob(".*calibrating"))


def test_artifact_of_another_model_or_setting_is_refused(tmp_path: Path) -> None:
    program = _flow.capture()
    folder = _flow.calibrate(program, tmp_path)
    with pytest.raises(InputError, match=r"'budget' is 0\.25"):
        apply(program, Flow(artifact=folder, budget=0.25))
    other = program.copy()
    name = "model.layers.1.mlp.up_proj.weight"
    other.set_weight(name, nn.Parameter(program.weight(name) * 2))
    with pytest.raises(InputError, match=r"made from another model: 'model\.layers\.1\.mlp\.up"):
        apply(other, Flow(artifact=folder))
    raw = (folder / artifact.TENSORS).read_bytes()
    (folder / artifact.TENSORS).write_bytes(raw[:-8])
    with pytest.raises(SerializationError, match="damaged"):
        apply(program, Flow(artifact=folder))
    with pytest.raises(InputError, match="holds no artifact"):
        apply(program, Flow(artifact=tmp_path))


def test_an_interrupted_calibration_goes_on(program: Program, tmp_path: Path) -> None:
    data = _flow.write_tokens(tmp_path)
    stage = FlowCalibration.from_config(_flow.settings(data, criterion="uniform"))
    seen: list[str] = []

    def stop(title: str, done: int, total: int) -> None:
        seen.append(f"{title} {done}/{total}")
        if title == "prune" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.calibrate(program, tmp_path / "masks", stop)
    assert not (tmp_path / "masks").exists()
    (kept,) = tmp_path.glob(".*calibrating")
    assert len(list(kept.glob("*.safetensors"))) == 2
    stage.calibrate(program, tmp_path / "masks")
    whole, _ = stage.calibrate(program, tmp_path / "again")
    resumed = artifact.read(tmp_path / "masks", "flow").tensors()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.tensors().items())
    assert seen[0].startswith("measure 0/")


def test_steps_and_files(program: Program, data: Path, tmp_path: Path) -> None:
    pruned = apply(program, _flow.flow(data, criterion="uniform"), check=False)
    values = inputs_of(pruned, batch=2)
    whole = pruned(**values)[0]
    for end, logits in zip([5, 6, 19], run_steps(insert_state(pruned), values, [5, 6, 19]),
                           strict=True):  # fmt: skip
        seen = values["attention_mask"][:, end - 1].bool()
        torch.testing.assert_close(logits[seen], whole[seen, end - 1], atol=2e-5, rtol=1e-4)
    loaded = fxgraft.load(pruned.save(tmp_path / "saved"))
    assert isinstance(loaded, Program)
    assert torch.equal(loaded(**values)[0], whole)
    assert not loaded.diff(pruned)


def test_a_second_run_is_the_identity(program: Program, tmp_path: Path) -> None:
    """Weights that already follow the pattern are kept as they are."""
    found = _flow.study(program, criterion="uniform", m=(8,))
    _, assignment = found.select(Workspace())
    run = found.prune(assignment, "prune", Workspace())
    once = program.copy()
    weights = decode_all(program, found.found.units, run.tensors)
    for name, value in weights.items():
        once.set_weight(name, nn.Parameter(value))
    again = _flow.study(once, criterion="uniform", m=(8,))
    second = again.prune(again.select(Workspace())[1], "prune", Workspace())
    for name, value in decode_all(once, again.found.units, second.tensors).items():
        assert torch.equal(value, weights[name])
    packed = apply(program, _flow.flow(_flow.write_tokens(tmp_path)), check=False)
    with pytest.raises(ContractError, match="dense_weights"):
        apply(packed, _flow.flow(tmp_path / "tokens.safetensors"))


@pytest.mark.parametrize(
    "build",
    [models.gpt2, models.qwen2, models.phi3, models.gemma2, models.opt, models.mamba, models.jamba],
)
def test_architectures(build: Callable[[], nn.Module], data: Path) -> None:
    program = fxgraft.capture(build())
    pruned = apply(program, _flow.flow(data, criterion="uniform", m=(4,)))
    assert sparse_nodes(pruned)
    left = {str(node.meta.get("module")) for node in sparse_nodes(pruned)}
    assert not any(word in path for path in left for word in ("head", "embed", "norm", "router"))


def test_gpt2_keeps_its_biases(data: Path) -> None:
    program = fxgraft.capture(models.gpt2())
    pruned = apply(program, _flow.flow(data, criterion="uniform", m=(4,)), check=False)
    assert all(len(node.args) == 4 and node.args[3] is not None for node in sparse_nodes(pruned))


def test_experts_have_their_own_statistics() -> None:
    program = fxgraft.capture(models.mixtral())
    found = _flow.study(program, criterion="uniform", m=(4,))
    experts = [unit for unit in found.found.units if "experts" in unit.weight]
    assert {unit.product.copies for unit in experts} == {4}
    squares = found.statistics[experts[0]].squares
    assert not torch.allclose(squares[0], squares[1])
    assert not any("gate" in unit.weight.split("mlp.")[-1].split(".")[0] for unit in
                   found.found.units if "experts" not in unit.weight)  # fmt: skip
    assert set(found.found.left.values()) == {"a router or gate"}


def test_experts_without_tokens_fall_back_to_magnitude(tmp_path: Path) -> None:
    program = fxgraft.capture(models.mixtral())
    few = {"input_ids": torch.tensor([[1, 2]])}
    save_file(few, tmp_path / "few.safetensors")
    step = Flow(data=(tmp_path / "few.safetensors",), samples=1, criterion="uniform", m=(4,))
    pruned = apply(program, step, check=False)
    assert any("no token reached" in line for line in pruned.history[-1].summary)
    found = _flow.study(program, [few], criterion="uniform", m=(4,), samples=1)
    unit = next(
        u for u in found.found.units if "experts" in u.weight and found.statistics[u].unseen
    )
    copy = found.statistics[unit].unseen[0]
    matrix = unit.read(program.weight(unit.weight))[copy]
    kept = group_mask(matrix.abs(), Pattern(2, 4))
    products = weight_products(pruned).values()
    stored = next(p for p in products if p.weights == (f"{unit.weight}_values",))
    assert torch.equal(stored.matrices(pruned)[copy], torch.where(kept, matrix, 0))


def test_mamba_prunes_the_outer_projections(data: Path) -> None:
    program = fxgraft.capture(models.mamba())
    found = layers.find(program)
    assert {unit.role for unit in found.units} == {"in_proj", "out_proj"}
    reasons = " ".join(found.left.values())
    assert "recurrence's dt" in reasons
    included = layers.find(program, include=["*x_proj"])
    assert {unit.role for unit in included.units} == {"in_proj", "out_proj", "x_proj"}
    assert sparse_nodes(apply(program, _flow.flow(data, m=(8,))))


def test_vision_transformer(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=64, image_size=16, patch_size=8)  # fmt: skip
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    save_file({"pixel_values": images}, tmp_path / "images.safetensors")
    program = fxgraft.capture(model, {"pixel_values": images[:2]})
    pruned = apply(program, _flow.flow(tmp_path / "images.safetensors"))
    assert len(sparse_nodes(pruned)) >= 2 * 4
    folder = FlowCalibration.from_config(_flow.settings(tmp_path / "images.safetensors"))
    written, _ = folder.calibrate(program, tmp_path / "masks")
    loss = written.results["loss"]
    assert loss["dense"] == 0
    assert 0 < loss["pruned"] <= loss["uniform"]


def test_encoder(data: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=64)  # fmt: skip
    program = fxgraft.capture(BertForMaskedLM(config).eval())
    assert not _flow.study(program).objective.is_causal
    pruned = apply(program, _flow.flow(data))
    assert len(sparse_nodes(pruned)) >= 2 * 4


def test_keep_dense_counts_as_sparsity_0(program: Program, data: Path) -> None:
    step = _flow.flow(data, budget=0.25, keep_dense=("0", "*layers.2.mlp*"), m=(8,))
    pruned = apply(program, step)
    paths = {str(node.meta["module"]) for node in sparse_nodes(pruned)}
    assert not any(".layers.0." in path or "layers.2.mlp" in path for path in paths)
    assert "sparsity 0.25, as asked" in pruned.history[-1].summary[0]
    with pytest.raises(InputError, match="'\\*nothing\\*' in 'keep_dense' matches no"):
        apply(program, _flow.flow(data, keep_dense=("*nothing*",)))


def test_padding(data: Path) -> None:
    """64 and 96 inputs; 36 of them do not divide into groups of 8."""
    model = _flow.llama(intermediate_size=36)
    program = fxgraft.capture(model)
    with pytest.raises(InputError, match="down_proj' has 36 inputs, which groups of 8") as caught:
        apply(program, _flow.flow(data, m=(8,)))
    assert "[2, 4]" in caught.value.remedy
    pruned = apply(program, _flow.flow(data, m=(8,), pad=True, criterion="uniform"))
    values = inputs_of(program, batch=2)
    weights = dense_weights(pruned)
    assert weights[6].shape == (64, 40)
    assert bool((weights[6][:, 36:] == 0).all())
    seen = values["attention_mask"].bool()
    for index, unit in enumerate(layers.find(program).units):
        weights[index] = weights[index][:, : unit.product.reduction]
        program.set_weight(unit.weight, weights[index])
    torch.testing.assert_close(pruned(**values)[0][seen], program(**values)[0][seen])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m": (6,)}, "m = 6 is no group width"),
        ({"m": ()}, "no N:M"),
        ({"m": (4,), "n": (5,)}, "n = 5"),
        ({"n": (0,)}, "n = 0"),
        ({"budget": -0.1}, "budget"),
        ({"budget": 1.0}, "budget"),
        ({"budget": 0.6, "n": (4, 8), "m": (8,)}, "reach 0 to 0.5"),
        ({"threshold": 0.0}, "threshold"),
        ({"criterion": "best"}, "criterion"),
        ({"samples": 0}, "samples"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(changes: dict[str, Any], message: str) -> None:
    for kind in (Flow, FlowCalibration):
        with pytest.raises(InputError, match=message):
            kind.from_config(changes)


def test_wrong_data(program: Program, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither an artifact nor calibration data"):
        apply(program, Flow())
    with pytest.raises(InputError, match="8 samples, 9 are needed"):
        apply(program, _flow.flow(_flow.write_tokens(tmp_path), samples=9))
    (tmp_path / "text.txt").write_text("a few words")
    with pytest.raises(InputError, match="tokenizer is not known"):
        apply(program, Flow(data=(tmp_path / "text.txt",)))
    (tmp_path / "text.pdf").write_text("a few words")
    with pytest.raises(InputError, match="neither text nor tensors"):
        apply(program, Flow(data=(tmp_path / "text.pdf",), tokenizer=str(tmp_path)))


def test_nan_is_refused_with_the_module(tmp_path: Path) -> None:
    data = _flow.write_tokens(tmp_path)
    program = _flow.capture()
    name = "model.layers.1.mlp.up_proj.weight"
    broken = program.copy()
    weight = program.weight(name).detach().clone()
    weight[0, 0] = float("nan")
    broken.set_weight(name, nn.Parameter(weight))
    stage = FlowCalibration.from_config(_flow.settings(data))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.(up|down)_proj"):
        stage.calibrate(broken, tmp_path / "masks")
    assert not (tmp_path / "masks").exists()


def test_dead_inputs_are_reported(tmp_path: Path) -> None:
    data = _flow.write_tokens(tmp_path)
    model = _flow.llama()
    with torch.no_grad():
        cast(Any, model).model.layers[0].input_layernorm.weight[3] = 0
    program = fxgraft.capture(model)
    pruned = apply(program, _flow.flow(data, criterion="uniform", update="hessian"), check=False)
    assert any("input channels were always zero" in line for line in pruned.history[-1].summary)
    assert bool((dense_weights(pruned)[0][:, 3] == 0).all())


def test_an_all_zero_layer_is_allowed(data: Path) -> None:
    model = _flow.llama()
    with torch.no_grad():
        cast(Any, model).model.layers[1].self_attn.k_proj.weight.zero_()
    program = fxgraft.capture(model)
    assert sparse_nodes(apply(program, _flow.flow(data)))


def test_shared_and_quantised_weights_are_refused(data: Path) -> None:
    model = _flow.llama()
    blocks = cast(Any, model).model.layers
    blocks[1].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    with pytest.raises(InputError, match=r"up_proj\.weight' is shared"):
        apply(fxgraft.capture(model), _flow.flow(data))
    program = _flow.capture()
    name = "model.layers.0.mlp.up_proj.weight"
    tiny = program.weight(name).detach().to(torch.float8_e4m3fn)
    packed = program.copy()
    graphs.set_weight(packed.graph_module, name, tiny)
    with pytest.raises(InputError, match="quantised"):
        layers.find(packed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_masks_are_those_of_the_cpu(program: Program, tmp_path: Path) -> None:
    moved = program.copy()
    placement.move(moved, "cuda")
    found = [_flow.study(p, criterion="uniform", m=(8,)) for p in (program, moved)]
    for one, two in zip(found[0].found.units, found[1].found.units, strict=True):
        scores = found[0].scores(one)
        assert torch.equal(
            group_mask(scores, Pattern(4, 8)), group_mask(scores.cuda(), Pattern(4, 8)).cpu()
        )
        torch.testing.assert_close(found[1].scores(two).cpu(), scores, rtol=1e-3, atol=1e-5)
