"""``optimize`` on whole models: what is fused per layer, same numbers, nothing left to do."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import nn

from fxgraft import graph as graphs
from fxgraft import registry
from fxgraft.errors import InputError
from fxgraft.frontends.capture import capture
from fxgraft.passes.optimize import Optimize
from fxgraft.program import Program
from fxgraft.state import insert_state
from fxgraft.transform import apply
from tests import models
from tests.core.test_state import LENGTH, inputs_of, run_steps

TWO_LAYERS = ("llama", "gemma2", "cohere", "mixtral", "mamba")
NORM, ROTARY, GATED = "fxgraft.rms_norm", "fxgraft.rotary", "fxgraft.gated_activation"
MERGED, LAYER_NORM = "merged", "aten.layer_norm"

Golden = Callable[[str, str], None]

# For each family its configuration, and how many of each kind there are per layer and outside.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, int], dict[str, int]]] = {
    "llama": ({}, {NORM: 2, ROTARY: 2, GATED: 1, MERGED: 2}, {NORM: 1}),
    "gemma2": (
        {"head_dim": 8, "sliding_window": 6},
        {NORM: 4, ROTARY: 2, GATED: 1, MERGED: 2},
        {NORM: 1},
    ),
    "gemma3_text": (
        {"head_dim": 8, "sliding_window": 6},
        {NORM: 6, ROTARY: 2, GATED: 1, MERGED: 2},
        {NORM: 1},
    ),
    "qwen2": ({}, {NORM: 2, ROTARY: 2, GATED: 1, MERGED: 2}, {NORM: 1}),
    "qwen3": ({"head_dim": 8}, {NORM: 4, ROTARY: 2, GATED: 1, MERGED: 2}, {NORM: 1}),
    "phi3": ({}, {NORM: 2, ROTARY: 2, GATED: 1}, {NORM: 1}),
    "cohere": ({}, {LAYER_NORM: 1, ROTARY: 2, GATED: 1, MERGED: 2}, {LAYER_NORM: 1}),
    "gpt_neox": ({}, {ROTARY: 2, LAYER_NORM: 2}, {LAYER_NORM: 1}),
    "mixtral": (
        {"num_local_experts": 4},
        {NORM: 2, ROTARY: 2, GATED: 1, MERGED: 1},
        {NORM: 1},
    ),
    "bert": ({}, {LAYER_NORM: 2, MERGED: 1}, {LAYER_NORM: 1}),
    "mamba": ({"state_size": 4, "time_step_rank": 2}, {NORM: 1}, {NORM: 1}),
    "gpt2": ({"n_embd": 32, "n_layer": 1, "n_head": 4}, {"aten.gelu": 1}, {}),
}
GENERATE = ["llama", "gemma2", "qwen3", "cohere", "mixtral", "mamba"]


def layers(family: str) -> int:
    return 2 if family in TWO_LAYERS else 1


def build(family: str) -> nn.Module:
    library = cast(Any, transformers)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers(family),
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "vocab_size": models.VOCABULARY, "initializer_range": 0.2, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    config = library.AutoConfig.for_model(family, **{**sizes, **FAMILIES[family][0]})
    head = library.AutoModel if family == "bert" else library.AutoModelForCausalLM
    model = head.from_config(config).eval()
    with torch.no_grad():
        # Weights of norms start as ones or zeros, which would hide a forgotten one.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@functools.cache
def programs(family: str) -> tuple[Program, Program]:
    """A family's Program and the optimised one; tests must not change them."""
    program = capture(build(family))
    return program, apply(program, Optimize())


def kinds(program: Program) -> Counter[str]:
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    found = Counter(graphs.short_target(node) for node in calls)
    found[MERGED] = sum("+" in str(node.target) for node in program.graph.find_nodes(op="get_attr")
                        if str(node.target).endswith(".weight"))  # fmt: skip
    return found


def layouts(value: object) -> object:
    """Shape, strides and dtype, at the sizes that stand in for the dynamic ones."""
    if isinstance(value, torch.Tensor):
        sizes = [hint(size) for size in (*value.shape, *value.stride())]
        return sizes, value.dtype
    if isinstance(value, (list, tuple)):
        return [layouts(item) for item in cast("list[object]", value)]
    return hint(value)


def hint(size: object) -> object:
    return cast(Any, size).node.hint if isinstance(size, torch.SymInt) else size


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_fused_per_layer(family: str) -> None:
    before, after = programs(family)
    per_layer, outside = FAMILIES[family][1:]
    found = kinds(after)
    for kind in (NORM, ROTARY, GATED, MERGED, LAYER_NORM, "aten.gelu"):
        if kind == LAYER_NORM and family not in ("cohere", "gpt_neox", "bert"):
            continue
        if kind == "aten.gelu" and kind not in per_layer:
            continue
        assert found[kind] == layers(family) * per_layer.get(kind, 0) + outside.get(kind, 0), kind
    for leftover in ("rsqrt", "silu", "neg", "dropout", "type_as", "alias", "pow", "contiguous"):
        assert not found[f"aten.{leftover}"], leftover
    assert len(after.graph.nodes) < len(before.graph.nodes)
    assert after.count_parameters() == pytest.approx(before.count_parameters(), rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [(2, 13), (3, 7)])
def test_same_numbers(family: str, sizes: tuple[int, int]) -> None:
    before, after = programs(family)
    inputs = before.example(seed=1, batch=sizes[0], sequence=sizes[1])
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, :3] = 0
    if "attention_mask" in inputs and "position_ids" in inputs:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for expected, actual in zip(before(**inputs), after(**inputs), strict=True):
        scale = float(expected.abs().max())
        assert float((expected - actual).abs().max()) <= 1e-5 * max(scale, 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_run_finds_nothing(family: str) -> None:
    again = programs(family)[1].copy()
    assert Optimize().run(again) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_metadata_is_true_down_to_strides(family: str) -> None:
    after = programs(family)[1].copy()
    recorded = {node: layouts(node.meta.get("val")) for node in after.graph.nodes}
    graphs.propagate(after.graph_module)
    for node in after.graph.nodes:
        if node.op == "call_function":
            assert layouts(node.meta["val"]) == recorded[node], node


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_strides_are_those_of_a_run(family: str) -> None:
    after = programs(family)[1]

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor) and value.numel() and n.op == "call_function":
                recorded = n.meta["val"]
                assert recorded.is_contiguous() == value.is_contiguous(), n
            return value

    inputs = after.bind(**after.example(batch=5, sequence=7))
    with torch.no_grad():
        Recorder(after.graph_module).run(*[value.contiguous() for value in inputs])


@pytest.mark.parametrize("family", GENERATE)
def test_steps_equal_the_whole(family: str) -> None:
    before, after = programs(family)
    values = inputs_of(after, batch=3)
    whole = before(**values)[0]
    cuts = [7, 8, 12, *range(13, LENGTH + 1)]
    for cut, logits in zip(cuts, run_steps(insert_state(after), values, cuts), strict=True):
        torch.testing.assert_close(logits, whole[:, cut - 1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_everything_switched_off_changes_nothing(family: str) -> None:
    before = programs(family)[0]
    neutral = Optimize().neutral()
    assert not any(neutral.config().values())
    after = apply(before, neutral)
    assert not after.diff(before)
    assert [n.name for n in after.graph.nodes] == [n.name for n in before.graph.nodes]
    assert after.history[-1].error == 0.0


@pytest.mark.parametrize("field", Optimize.model_fields)
def test_each_rewrite_works_alone(field: str) -> None:
    before = programs("llama")[0]
    after = apply(before, Optimize().neutral().model_copy(update={field: True}))
    error = after.history[-1].error
    assert error is not None
    assert error <= 1e-5


def test_layers_know_the_merged_projections() -> None:
    layer = programs("llama")[1].layers[1]
    owner = "model.layers.1"
    assert layer.projections["qkv"].meta["module"] == f"{owner}.self_attn.q_proj+k_proj+v_proj"
    assert layer.projections["output"].meta["module"] == f"{owner}.self_attn.o_proj"
    assert layer.mlp[0].meta["module"] == f"{owner}.mlp.gate_proj+up_proj"


def test_caller_keeps_weights_and_graph() -> None:
    before, after = programs("llama")
    assert not any(node.meta.get("made_by") for node in before.graph.nodes)
    parts = [before.weight(f"model.layers.0.self_attn.{part}_proj.weight") for part in "qkv"]
    merged = after.weight("model.layers.0.self_attn.q_proj+k_proj+v_proj.weight")
    assert torch.equal(merged, torch.cat(parts))
    assert "model.layers.0.self_attn.q_proj.weight" not in dict(after.weights())
    assert after.weight("lm_head.weight") is before.weight("lm_head.weight")


def test_meta_weights_are_merged_but_not_folded() -> None:
    with torch.device("meta"):
        model = build_on_meta()
    program = capture(model)
    after = apply(program, Optimize())
    assert kinds(after)[MERGED] == 4
    assert all(weight.is_meta for _, weight in after.weights() if weight.dim() == 2)


def build_on_meta() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=models.VOCABULARY,
    )  # fmt: skip
    return cast(Any, transformers).LlamaForCausalLM(config).eval()


def test_weights_mapped_from_one_file_are_merged(tmp_path: Path) -> None:
    cast(Any, build("llama")).save_pretrained(tmp_path)
    program = capture(tmp_path)
    after = apply(program, Optimize())
    assert kinds(after)[MERGED] == 4
    inputs = after.example()
    assert torch.allclose(after(**inputs)[0], programs("llama")[0](**inputs)[0], atol=1e-5)


def test_saved_and_loaded(tmp_path: Path) -> None:
    after = programs("cohere")[1]
    loaded = Program.load(after.save(tmp_path / "program"))
    inputs = after.example(seed=2)
    assert torch.equal(loaded(**inputs)[0], after(**inputs)[0])
    assert Optimize().run(loaded) == []


def test_finds_the_pass_and_refuses_unknown_fields() -> None:
    assert registry.find("optimize") is Optimize
    with pytest.raises(InputError, match="fuse_normz"):
        Optimize.from_config({"fuse_normz": False})


def test_golden_diff(golden: Golden) -> None:
    before, after = programs("llama")
    golden("optimize_llama", str(after.diff(before)))
