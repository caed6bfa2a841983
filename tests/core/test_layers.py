"""The layer view against the original modules: paths, roles, and values seen by hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from fxgraft import graph as graphs
from fxgraft.frontends.capture import capture
from fxgraft.graph import made_by
from fxgraft.kernels.spec import dims
from fxgraft.layers import Layer, is_linear
from fxgraft.program import Program
from tests import models

Example = Mapping[str, Tensor] | None
GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SEPARATE = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
}
OUT_PROJ = {**SEPARATE, "output": "self_attn.out_proj"}


def tiny(name: str, config: str, **values: Any) -> nn.Module:
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    library = cast(Any, transformers)
    return getattr(library, name)(getattr(library, config)(**values)).eval()


def decoder(family: str, **changes: Any) -> nn.Module:
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return tiny(f"{family}ForCausalLM", f"{family}Config", **{**sizes, **changes})


def encoder_decoder(family: str, **changes: Any) -> nn.Module:
    sizes = {
        "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    }  # fmt: skip
    name = f"{family}ForConditionalGeneration"
    return tiny(name, f"{family}Config", **{**sizes, **changes})


def tokens(*names: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    return {name: torch.ones_like(ids) if "mask" in name else ids for name in names}


class Plain(nn.Module):
    """torch's own encoder, without transformers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.enc(x)


@dataclass(frozen=True)
class Case:
    """What one block of a model must look like; module paths are relative to the block."""

    build: Callable[[], nn.Module]
    path: str
    stack: str
    kind: str
    projections: Mapping[str, str]
    mlp: tuple[str, ...] = ()
    example: Example = None
    index: int = -1
    layers: int = 2
    mixers: int = 1
    others: tuple[Mapping[str, str], ...] = field(default=())


CASES = {
    "llama": Case(
        lambda: models.llama(num_hidden_layers=2),
        "model.layers.1", "model", "attention", SEPARATE, GATED,
    ),
    "gpt2": Case(
        models.gpt2, "transformer.h.1", "transformer", "attention",
        {"qkv": "attn.c_attn", "output": "attn.c_proj"}, ("mlp.c_fc", "mlp.c_proj"),
    ),
    "gpt_neox": Case(
        lambda: decoder("GPTNeoX"), "gpt_neox.layers.1", "gpt_neox", "attention",
        {"qkv": "attention.query_key_value", "output": "attention.dense"},
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "phi": Case(
        lambda: decoder("Phi"), "model.layers.1", "model", "attention",
        {**SEPARATE, "output": "self_attn.dense"}, ("mlp.fc1", "mlp.fc2"),
    ),
    "gemma2": Case(
        lambda: models.gemma2(num_hidden_layers=2),
        "model.layers.1", "model", "attention", SEPARATE, GATED,
    ),
    "mixtral": Case(
        lambda: decoder("Mixtral", num_local_experts=4, num_key_value_heads=2),
        "model.layers.1", "model", "attention", SEPARATE,
        ("mlp.gate", "mlp.experts", "mlp.experts"),
    ),
    "qwen_moe": Case(
        lambda: decoder("Qwen3Moe", num_experts=4, num_experts_per_tok=2,
                        moe_intermediate_size=16, num_key_value_heads=2, head_dim=8),
        "model.layers.0", "model", "attention", SEPARATE,
        ("mlp.gate", "mlp.experts", "mlp.experts"), index=0,
    ),
    "deepseek": Case(
        lambda: decoder("DeepseekV3", kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
                        qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=2, n_group=1,
                        topk_group=1, n_routed_experts=4, num_key_value_heads=4),
        "model.layers.1", "model", "attention",
        {"query": "self_attn.q_b_proj", "key_value": "self_attn.kv_b_proj",
         "output": "self_attn.o_proj"}, GATED,
    ),
    "bert": Case(
        lambda: tiny("BertModel", "BertConfig", vocab_size=64, hidden_size=32,
                     intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
        "encoder.layer.1", "encoder", "attention",
        {"query": "attention.self.query", "key": "attention.self.key",
         "value": "attention.self.value", "output": "attention.output.dense"},
        ("intermediate.dense", "output.dense"), tokens("input_ids", "attention_mask"),
    ),
    "vit": Case(
        lambda: tiny("ViTModel", "ViTConfig", hidden_size=32, intermediate_size=48, image_size=16,
                     num_hidden_layers=2, num_attention_heads=4, patch_size=4),
        "layers.0", "", "attention",
        {role: path.replace("self_attn", "attention") for role, path in SEPARATE.items()},
        ("mlp.fc1", "mlp.fc2"), {"pixel_values": torch.randn(2, 3, 16, 16)}, index=0,
    ),
    "swin": Case(
        lambda: tiny("SwinModel", "SwinConfig", image_size=16, patch_size=2, embed_dim=8,
                     depths=[2, 2], num_heads=[2, 2], window_size=4),
        "encoder.layers.1.blocks.0", "encoder.layers.1", "attention",
        {role: path.replace("self_attn", "attention") for role, path in SEPARATE.items()},
        ("mlp.fc1", "mlp.fc2"), {"pixel_values": torch.randn(2, 3, 16, 16)}, index=2, layers=4,
    ),
    "t5": Case(
        lambda: tiny("T5ForConditionalGeneration", "T5Config", vocab_size=64, d_model=32, d_kv=8,
                     d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
        "decoder.block.1", "decoder", "attention",
        {role: f"layer.0.SelfAttention.{role[0]}"
         for role in ("query", "key", "value", "output")},
        ("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"), layers=4, mixers=2,
        others=({role: f"layer.1.EncDecAttention.{role[0]}"
                 for role in ("query", "key", "value", "output")},),
    ),
    "bart": Case(
        lambda: encoder_decoder("Bart"), "model.decoder.layers.0", "model.decoder", "attention",
        OUT_PROJ, ("fc1", "fc2"), index=2, layers=4, mixers=2,
        others=({r: p.replace("self_attn", "encoder_attn") for r, p in OUT_PROJ.items()},),
    ),
    "mamba": Case(
        models.mamba, "backbone.layers.1", "backbone", "selective_scan",
        {"input": "mixer.in_proj", "dt": "mixer", "B": "mixer.x_proj", "output": "mixer.out_proj"},
    ),
    "falcon_h1": Case(
        lambda: decoder("FalconH1", mamba_d_ssm=64, mamba_d_head=16, mamba_n_heads=4, head_dim=8,
                        mamba_d_state=8, mamba_chunk_size=8, num_key_value_heads=2),
        "model.layers.1", "model", "ssd+attention",
        {"input": "mamba.in_proj", "output": "mamba.out_proj"},
        ("feed_forward.up_proj", "feed_forward.gate_proj", "feed_forward.down_proj"), mixers=2,
        others=(SEPARATE,),
    ),
    "plain": Case(
        Plain, "enc.layers.1", "enc", "attention", {"qkv": "self_attn", "output": "self_attn"},
        ("linear1", "linear2"), {"x": torch.randn(2, 5, 32)},
    ),
}  # fmt: skip


@cache
def captured(name: str) -> tuple[nn.Module, Program]:
    model = CASES[name].build().eval()
    return model, capture(model, CASES[name].example)


def relative(nodes: Mapping[str, Node], layer: Layer) -> dict[str, str]:
    prefix = f"{layer.path}."
    return {role: str(n.meta["module"]).removeprefix(prefix) for role, n in nodes.items()}


@pytest.mark.parametrize("name", CASES)
def test_blocks_mixers_and_projections(name: str) -> None:
    case = CASES[name]
    layers = captured(name)[1].layers
    assert len(layers) == case.layers
    assert [layer.index for layer in layers] == list(range(case.layers))
    layer = layers[case.index]
    assert (layer.path, layer.stack, layer.kind) == (case.path, case.stack, case.kind)
    assert len(layer.mixers) == case.mixers
    assert layer.mixer is layer.mixers[0]
    assert relative(layer.projections, layer) == case.projections
    found = {str(place): node for place, node in enumerate(layer.mlp)}
    assert tuple(relative(found, layer).values()) == case.mlp
    for mixer, roles in zip(layer.mixers, (case.projections, *case.others), strict=True):
        assert relative(layer.projections_of(mixer), layer) == roles


class Recorder(Interpreter):
    """Runs a graph and keeps every node's value."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def hooked(model: nn.Module, path: str, seen: dict[str, list[Tensor]]) -> None:
    """Note a block's input and output while the model runs."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen[path] = [hidden, output[0] if isinstance(output, tuple) else output]

    model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("plain",)])
def test_residual_stream_is_what_the_blocks_take_and_give(name: str) -> None:
    model, program = captured(name)
    inputs = program.example(3)
    recorder = Recorder(program)
    seen: dict[str, list[Tensor]] = {}
    for layer in program.layers:
        hooked(model, layer.path, seen)
    with torch.no_grad():
        recorder.run(*program.bind(**inputs))
        model(**inputs, **({"use_cache": False} if CASES[name].example is None else {}))
    for layer in program.layers:
        hidden, output = seen[layer.path]
        torch.testing.assert_close(recorder.values[layer.residual_in], hidden, msg=layer.path)
        torch.testing.assert_close(
            recorder.values[layer.residual].reshape(output.shape), output, msg=layer.path
        )


def test_projections_are_the_modules_outputs() -> None:
    model, program = captured("llama")
    seen: dict[str, Tensor] = {}

    def note(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[path] = output

        return hook

    layer = program.layers[1]
    for path in [*SEPARATE.values(), *GATED]:
        model.get_submodule(f"{layer.path}.{path}").register_forward_hook(note(path))
    inputs = program.example(4)
    recorder = Recorder(program)
    with torch.no_grad():
        recorder.run(*program.bind(**inputs))
        model(**inputs)
    for role, path in SEPARATE.items():
        torch.testing.assert_close(recorder.values[layer.projections[role]], seen[path])
    for node, path in zip(layer.mlp, GATED, strict=True):
        torch.testing.assert_close(recorder.values[node], seen[path])


def test_consecutive_blocks_hand_over_the_residual_stream() -> None:
    layers = captured("llama")[1].layers
    for before, after in pairwise(layers):
        assert after.residual_in is before.residual


def test_kinds_of_a_hybrid() -> None:
    layers = capture(models.jamba()).layers
    assert [layer.kind for layer in layers] == [
        "selective_scan", "attention", "selective_scan", "attention",
    ]  # fmt: skip
    # Jamba's short convolution is part of the scan's layer, and counts where it is alone.
    assert all(len(layer.mixers) == 1 for layer in layers)


class Block(nn.Module):
    """A linear layer and, if asked, a short convolution, around a residual stream."""

    def __init__(self, convolve: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.taps = nn.Parameter(torch.randn(8, 3)) if convolve else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        if self.taps is not None:
            mixed = torch.ops.fxgraft.causal_conv1d(hidden.transpose(1, 2), self.taps)[0]
            hidden = mixed.transpose(1, 2)
        return x + hidden


def test_a_short_convolution_counts_where_it_is_alone() -> None:
    model = nn.Sequential(Block(True), Block(False))
    first, second = capture(model, (torch.randn(2, 5, 8),)).layers
    assert (first.kind, first.path, first.stack) == ("causal_conv1d", "0", "")
    assert list(first.projections) == ["input"]
    assert first.mlp == ()
    assert second.kind == "none"
    assert second.mixer is None
    assert second.projections == {}
    assert [str(node.meta["module"]) for node in second.mlp] == ["1.linear"]


def test_a_model_without_numbered_modules_has_no_layers() -> None:
    assert capture(nn.Linear(4, 4), (torch.randn(2, 4),)).layers == []


def test_a_convolutional_network_has_blocks_without_mixers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    layers = capture(model, (torch.randn(2, 3, 8, 8),)).layers
    assert [layer.path for layer in layers] == ["0", "1", "2"]
    assert {layer.kind for layer in layers} == {"none"}


def test_the_view_follows_a_rewrite() -> None:
    program = captured("llama")[1].copy()
    residual = program.layers[0].residual
    with made_by("test"):
        scaled = graphs.insert(residual, torch.ops.aten.mul.Tensor, (residual, 2.0), after=True)
    residual.replace_all_uses_with(scaled, lambda user: user is not scaled)
    layers = program.layers
    assert layers[0].residual is scaled
    assert layers[1].residual_in is scaled
    assert dims(scaled) == dims(residual)


def test_only_products_with_weights_are_linear() -> None:
    program = captured("mixtral")[1]
    linear = {str(n.meta["module"]) for n in program.graph.nodes if is_linear(n)}
    assert "model.layers.0.self_attn.q_proj" in linear
    assert "lm_head" in linear

    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.transpose(1, 2)

    scores = capture(Scores(), (torch.randn(2, 3, 4),))
    assert not any(is_linear(node) for node in scores.graph.nodes)
