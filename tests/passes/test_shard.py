"""``shard``: all shares of a model together give what the model gives (in one process)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import sympy
import torch
from torch import nn

import fxgraft
from fxgraft import collectives
from fxgraft import graph as graphs
from fxgraft.collectives import Share, share_of
from fxgraft.errors import (
    ContractError,
    GraphError,
    InputError,
    LoweringError,
    NothingMatchedError,
    NumericError,
    SerializationError,
)
from fxgraft.frontends.capture import capture
from fxgraft.kernels.spec import dims
from fxgraft.passes.optimize import Optimize
from fxgraft.passes.prune_heads import PruneHeads
from fxgraft.passes.shard import Shard, linears
from fxgraft.passes.shard.simulate import run_ranks
from fxgraft.pipeline import Pipeline
from fxgraft.program import Program
from fxgraft.state import insert_state
from fxgraft.transform import apply
from tests import models
from tests.core.test_state import inputs_of
from tests.passes._ranks import run_share_steps, run_shares, shares_of, with_others

Golden = Callable[[str, str], None]
FAMILIES = [
    models.llama, models.mistral, models.gemma2, models.qwen2, models.phi, models.phi3,
    models.gpt2, models.gpt_neox, models.opt, models.mixtral, models.gpt_oss, models.jamba,
]  # fmt: skip

_DIVIDED = {
    "self_attn.q": 0, "self_attn.k": 0, "self_attn.v": 0, "self_attn.o": 1,
    "mlp.gate": 0, "mlp.up": 0, "mlp.down": 1,
}  # fmt: skip
"""Which dimension of a layer's weights is divided."""


@cache
def captured(build: Callable[[], nn.Module]) -> tuple[nn.Module, Program]:
    model = build()
    return model, capture(model)


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, Program]:
    model = models.llama(num_hidden_layers=2)
    return model, capture(model)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Not started by torchrun."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def check_equals(model: nn.Module, shares: list[Program]) -> None:
    values = inputs_of(shares[0], batch=3)
    with torch.no_grad():
        wanted = model(**values, use_cache=False).logits
    seen = values["attention_mask"].bool()
    for logits in run_shares(shares, values):
        torch.testing.assert_close(logits[seen], wanted[seen], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("size", "vocabulary"), [(2, "split"), (4, "replicate")])
@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_shares_together_equal_the_model(
    build: Callable[[], nn.Module], size: int, vocabulary: str
) -> None:
    model, program = captured(build)
    shares = shares_of(program, size, vocabulary=vocabulary)
    check_equals(model, shares)
    layers = len(program.layers)
    summary = shares[0].history[-1].summary
    if build is models.jamba:
        assert summary[0] == f"rank 0 of {size}: 2 attentions and 4 MLPs divided"
    else:
        assert summary[0] == f"rank 0 of {size}: {layers} attentions and {layers} MLPs divided"


@pytest.mark.parametrize(
    ("build", "optimized"),
    [(models.llama, False), (models.gpt2, True), (models.mixtral, True), (models.jamba, True)],
)
def test_steps_with_state_equal_the_whole(build: Callable[[], nn.Module], optimized: bool) -> None:
    model, program = captured(build)
    if optimized:
        program = apply(program, Optimize(), check=False)
    values = inputs_of(program, batch=2)
    with torch.no_grad():
        whole = model(**values, use_cache=False).logits
    cuts = [7, 8, 9, 19]
    shares = shares_of(program, 2, vocabulary="split")
    for end, logits in zip(cuts, run_share_steps(shares, values, cuts), strict=True):
        seen = values["attention_mask"][:, end - 1].bool()
        torch.testing.assert_close(logits[seen], whole[seen, end - 1], atol=2e-5, rtol=1e-4)


def test_every_row_and_column_is_somewhere(llama: tuple[nn.Module, Program]) -> None:
    _, program = llama
    shares = shares_of(program, 2, vocabulary="split")

    def joined(name: str, dim: int) -> torch.Tensor:
        return torch.cat([share.weight(name) for share in shares], dim)

    for layer in range(2):
        for kind, dim in _DIVIDED.items():
            name = f"model.layers.{layer}.{kind}_proj.weight"
            torch.testing.assert_close(joined(name, dim), program.weight(name), rtol=0, atol=0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(joined(name, 0), program.weight(name), rtol=0, atol=0)


def test_more_processes_than_key_value_heads(llama: tuple[nn.Module, Program]) -> None:
    """Processes of one group hold the same key/value head; state is one head on each."""
    _, program = llama
    shares = shares_of(program, 4)
    name = "model.layers.1.self_attn.k_proj.weight"
    kept = [share.weight(name) for share in shares]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[2], kept[3])
    torch.testing.assert_close(torch.cat(kept[::2]), program.weight(name), rtol=0, atol=0)
    states = insert_state(shares[0]).states
    assert [state.shape[1] for state in states] == [1] * 4


def test_merged_layers_stay_merged() -> None:
    """One product for query, key and value, and one for gate and up, as before."""
    _, program = captured(models.phi3)
    share = shares_of(program, 2)[0]
    names = {name for name, _ in program.weights()}
    assert {name for name, _ in share.weights()} == names
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert share.weight(name).shape == (64, 64)
    products = share.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert len(list(products)) == 4 * 3 + 1


def test_weights_share_no_memory_with_the_whole(llama: tuple[nn.Module, Program]) -> None:
    _, program = llama
    share = shares_of(program, 2, vocabulary="split")[1]
    for name, weight in share.weights():
        assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size(), name


def test_results_of_experts_are_added_up_per_token() -> None:
    _, program = captured(models.mixtral)
    share = shares_of(program, 2)[0]
    batch, sequence = program.symbols["batch"], program.symbols["sequence"]
    sums = share.graph.find_nodes(op="call_function", target=collectives.ops.all_reduce.default)
    elements = {sympy.prod(dims(node)) for node in sums}
    assert elements == {batch * sequence * 64}
    assert share.weight("model.layers.0.mlp.experts.gate_up_proj").shape == (4, 96, 64)
    assert share.weight("model.layers.0.mlp.experts.down_proj").shape == (4, 64, 48)


def test_one_process_brings_the_bias_of_experts() -> None:
    program = capture(models.gpt_oss(num_hidden_layers=1))
    with torch.no_grad():
        program.weight("model.layers.0.mlp.experts.down_proj_bias").normal_()
    first, second = shares_of(program, 2)
    name = "model.layers.0.mlp.experts.down_proj_bias"
    assert torch.equal(first.weight(name), program.weight(name))
    assert not second.weight(name).any()


def test_biases_are_added_once() -> None:
    model = models.opt()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    check_equals(model, shares_of(capture(model), 2))


def test_one_process_changes_nothing(llama: tuple[nn.Module, Program], alone: Any) -> None:
    _, program = llama
    step = Shard(size=1, vocabulary="split")
    same = apply(program, step)
    assert not same.diff(program)
    assert share_of(same) is None
    assert step.neutral() == step
    assert Shard(size=2).neutral() == Shard(size=1)
    assert dict(same.weights()).keys() == dict(program.weights()).keys()


def test_graph_of_a_share(golden: Golden) -> None:
    program = capture(models.llama(num_hidden_layers=1))
    share = apply(program, Shard(size=2, rank=0, vocabulary="split"))
    golden("shard", str(share.diff(program)))


def test_the_check_runs_all_shares(llama: tuple[nn.Module, Program]) -> None:
    _, program = llama
    record = apply(program, Shard(size=2, rank=1)).history[-1]
    assert record.error is not None
    assert 0 < record.error < 1e-5
    assert "all 2 shares run in this process" in record.check


def test_the_check_finds_a_missing_sum(
    llama: tuple[nn.Module, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, program = llama
    monkeypatch.setattr(linears.collectives, "add_up", lambda value, share: value)
    with pytest.raises(NumericError, match="pass 'shard' is exact"):
        apply(program, Shard(size=2, rank=1, vocabulary="split"))


def test_a_share_is_saved_and_loaded(tmp_path: Path, llama: tuple[nn.Module, Program]) -> None:
    model, program = llama
    share = shares_of(program, 2, vocabulary="split", check=True)[1]
    loaded = fxgraft.load(share.save(tmp_path / "share"))
    assert isinstance(loaded, Program)
    assert share_of(loaded) == Share(2, 1)
    assert not loaded.diff(share)
    check_equals(model, with_others(loaded, program))


def test_a_damaged_note_of_the_share_is_refused(llama: tuple[nn.Module, Program]) -> None:
    _, program = llama
    for noted in ("no", {"size": 2}, {"size": 2, "rank": 2}, {"size": 2, "rank": 0, "group": 1}):
        broken = program.copy()
        broken.origin["shard"] = noted
        with pytest.raises(SerializationError, match="the share"):
            share_of(broken)


def test_a_share_needs_its_process_group(llama: tuple[nn.Module, Program]) -> None:
    _, program = llama
    passes = [Shard(size=2, rank=1)]
    for backend in ("torch", "auto"):
        with pytest.raises(LoweringError, match="no process group '0'") as caught:
            fxgraft.compile(program, passes=passes, backend=backend)
        assert "torchrun" in caught.value.remedy


@pytest.mark.parametrize(
    ("found", "words"), [(Share(4, 1), "rank 1 of 4"), (Share(2, 0), "rank 0")]
)
def test_a_share_runs_in_its_own_process_only(
    llama: tuple[nn.Module, Program], monkeypatch: pytest.MonkeyPatch, found: Share, words: str
) -> None:
    share = shares_of(llama[1], 2)[1]

    def here(name: str) -> Share:
        return found

    monkeypatch.setattr(collectives, "share_in", here)
    with pytest.raises(LoweringError, match=f"share of rank 1 of 2 .*this process is {words}"):
        fxgraft.compile(share, backend="torch")


def test_a_share_needs_a_group_that_sends_from_its_device(
    llama: tuple[nn.Module, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    share = shares_of(llama[1], 2)[1]
    monkeypatch.setattr(collectives, "share_in", lambda name: Share(2, 1))
    monkeypatch.setattr(collectives, "reaches", lambda share, device: False)
    with pytest.raises(LoweringError, match="lies on cpu, which process group '0' cannot send"):
        fxgraft.compile(share, backend="torch")


def test_a_share_is_no_onnx_file(llama: tuple[nn.Module, Program], tmp_path: Path) -> None:
    share = shares_of(llama[1], 2)[0]
    with pytest.raises(LoweringError, match="whole models"):
        fxgraft.export_onnx(share, tmp_path / "onnx")


def test_the_rank_comes_from_torchrun(
    llama: tuple[nn.Module, Program], alone: pytest.MonkeyPatch
) -> None:
    _, program = llama
    alone.setenv("RANK", "1")
    alone.setenv("WORLD_SIZE", "2")
    assert share_of(apply(program, Shard(size=2), check=False)) == Share(2, 1)
    with pytest.raises(InputError, match="'size' is 4, but process group '0' has 2"):
        apply(program, Shard(size=4))


def test_the_rank_must_be_known(llama: tuple[nn.Module, Program], alone: Any) -> None:
    _, program = llama
    with pytest.raises(InputError, match="field 'rank' is not given and cannot be known"):
        Pipeline.parse([{"shard": {"size": 2}}]).validate(program)
    with pytest.raises(InputError, match="'rank' is 2, with 'size' 2"):
        apply(program, Shard(size=2, rank=2))
    with pytest.raises(InputError, match="there is no such process group"):
        apply(program, Shard(size=2, group="nobody"))


def test_heads_that_cannot_be_divided(llama: tuple[nn.Module, Program]) -> None:
    with pytest.raises(InputError, match="cannot divide the 4 query and 2 key/value") as caught:
        apply(llama[1], Shard(size=3, rank=0))
    assert caught.value.remedy == "use one of the sizes 1, 2, 4"


def test_pruning_may_make_heads_divisible() -> None:
    """Six heads in three groups become four in two, so the size is checked after pruning."""
    model = models.llama(num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    program = capture(model)
    with pytest.raises(InputError, match="6 query and 3 key/value"):
        apply(program, Shard(size=4, rank=0))
    pruning = PruneHeads(heads={layer: [0, 1] for layer in range(3)})
    share = Pipeline.parse([pruning, Shard(size=4, rank=0)]).run(program)
    assert share.history[-1].summary[0] == "rank 0 of 4: 3 attentions and 3 MLPs divided"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: models.llama(vocab_size=129), "129 tokens cannot be divided"),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), "has no embedding"),
    ],
)
def test_vocabularies_that_cannot_be_split(build: Callable[[], nn.Module], words: str) -> None:
    model = build()
    example = None if hasattr(model, "config") else (torch.randn(3, 4),)
    with pytest.raises(InputError, match=words) as caught:
        apply(fxgraft.capture(model, example), Shard(size=2, rank=0, vocabulary="split"))
    assert caught.value.remedy == "use 'replicate'"


def test_tied_embeddings_stay_tied() -> None:
    model = models.llama(tie_word_embeddings=True)
    shares = shares_of(capture(model), 2, vocabulary="split")
    check_equals(model, shares)
    embedding, head = (shares[1].weight(n) for n in ("model.embed_tokens.weight", "lm_head.weight"))
    assert embedding is head
    assert embedding.shape == (64, 64)


def test_a_model_without_anything_to_divide() -> None:
    with pytest.raises(NothingMatchedError, match="attention heads and MLP channels"):
        apply(capture(models.mamba()), Shard(size=2, rank=0))


def test_what_stays_whole_is_named() -> None:
    """An MLP whose width is odd, and recurrent layers; the rest is divided."""
    program = capture(models.llama(intermediate_size=97))
    summary = apply(program, Shard(size=2, rank=0)).history[-1].summary
    assert "rank 0 of 2: 3 attentions and 0 MLPs divided" in summary
    assert "3 MLPs are whole: 2 does not divide their width" in summary
    assert summary[-1].startswith("whole on every process: model.layers.*.mlp.down_proj.weight (3)")
    summary = apply(captured(models.jamba)[1], Shard(size=2, rank=0)).history[-1].summary
    assert "model.layers.*.mamba.in_proj.weight (2)" in summary[-1]


def test_norms_over_all_heads_keep_attention_whole() -> None:
    model = models.olmo2()
    shares = shares_of(capture(model), 2)
    check_equals(model, shares)
    summary = shares[0].history[-1].summary
    assert summary[0] == "rank 0 of 2: 0 attentions and 3 MLPs divided"
    assert any(
        line.startswith("attention of model.layers.*.self_attn is whole (3): ") for line in summary
    )


@pytest.mark.parametrize("later", [Shard(size=2, rank=0), Optimize(), PruneHeads(heads={0: [0]})])
def test_no_pass_rewrites_a_share(llama: tuple[nn.Module, Program], later: fxgraft.Pass) -> None:
    share = shares_of(llama[1], 2)[0]
    with pytest.raises(ContractError, match="cannot rewrite one process's share") as caught:
        apply(share, later)
    assert "before 'shard'" in caught.value.remedy


def test_yaml(tmp_path: Path, llama: tuple[nn.Module, Program]) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("passes:\n  - optimize\n  - shard: {size: 2, rank: 1, vocabulary: split}\n")
    share = Pipeline.parse(file).run(llama[1])
    assert share_of(share) == Share(2, 1)
    file.write_text("passes:\n  - shard: {size: 2, vocabulary: half}\n")
    with pytest.raises(InputError, match=r"two\.yaml, line 2: .*vocabulary"):
        Pipeline.parse(file)


def test_cost_of_a_share(llama: tuple[nn.Module, Program]) -> None:
    """Shares of the products add up to the whole; what is sent is 4 sums and one join of logits."""
    _, program = llama
    shares = shares_of(program, 2, vocabulary="split")
    costs = [share.cost() for share in shares]
    assert [cost.unknown for cost in costs] == [{}, {}]
    products = [cast(Any, cost.by_op()["aten.linear"]).flops for cost in costs]
    assert sum(products) == cast(Any, program.cost().by_op()["aten.linear"]).flops
    sent = collectives.sent_bytes(shares[0])
    # Per token in float32: sums of five hidden states (one of embeddings), half of the logits.
    assert str(sent) == f"{4 * (5 * 64 + 64)}*batch*sequence"
    assert collectives.sent_bytes(program) == 0


def test_a_rank_that_fails_is_named(llama: tuple[nn.Module, Program]) -> None:
    """Its own error is raised, not that of the ranks that wait for it."""
    shares = shares_of(llama[1], 2)
    broken = shares[1].copy()
    name = "model.layers.1.mlp.down_proj.weight"
    graphs.set_weight(broken.graph_module, name, nn.Parameter(torch.zeros(64, 3)))
    values = inputs_of(shares[0], batch=1)
    with pytest.raises(GraphError, match="linear"):
        run_ranks([shares[0], broken], [values, values])
