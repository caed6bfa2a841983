"""Tiny random models of every causal-LM family that the installed transformers knows.

``tiny_config`` shrinks a family's default configuration by field name (``SIZES``), keeps one
layer of every kind that the full-size default has, and then applies the few per-family values of
``OVERRIDES``. ``tiny_model`` builds the model from that configuration and makes its weights large
and irregular enough that gates, biases and routers change the logits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import transformers
from torch import Tensor, random
from torch.nn import Embedding
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 128
FIRST_TEXT_TOKEN = 8
FIRST_MEDIA_TOKEN = 112
"""Text tokens lie in ``[FIRST_TEXT_TOKEN, FIRST_MEDIA_TOKEN)``; image and audio markers above."""

SLIDING_WINDOW = 8
MAX_LAYERS = 4
VECTOR_NOISE = 0.1


class Unsupported(Exception):  # noqa: N818 - says what happened, not that something broke
    """No tiny model of the family ``name`` can be built; ``reason`` says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


def _same(value: object, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: Mapping[str, Any] = {
    **_same(VOCAB_SIZE, "vocab_size decoder_vocab_size vocab_size_per_layer_input"),
    **_same(VOCAB_SIZE, "unpadded_vocab_size"),
    **_same(64, "hidden_size n_embd d_model emb_dim embedding_dim embedding_size lru_width"),
    **_same(64, "word_embed_proj_dim out_hidden_size hidden_size_global ple_embed_dim"),
    **_same(64, "input_embedding_size output_embedding_size backbone_hidden_size"),
    **_same(64, "adapter_input_size adapter_in_dim adapter_out_dim"),
    **_same(96, "intermediate_size ffn_hidden_size decoder_ffn_dim encoder_ffn_dim ffn_dim"),
    **_same(96, "n_inner dff d_ff dim_ff d_inner feed_forward_size dense_intermediate_size"),
    **_same(96, "intermediate_size_mlp mlp_dim prefix_dense_intermediate_size"),
    **_same(48, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size"),
    **_same(48, "shared_experts_intermediate_size shared_intermediate_size"),
    **_same(48, "moe_shared_expert_intermediate_size"),
    **_same(4, "num_attention_heads n_head n_heads num_heads attention_heads"),
    **_same(4, "decoder_attention_heads encoder_attention_heads swa_num_attention_heads"),
    **_same(4, "num_decoder_attention_heads num_encoder_attention_heads"),
    **_same(2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads"),
    **_same(16, "head_dim attention_head_size d_head dim_head swa_head_dim d_kv kv_channels"),
    **_same(2, "encoder_layers decoder_layers num_encoder_layers num_decoder_layers depth"),
    **_same(2, "num_global_layers conf_num_hidden_layers"),
    **_same(256, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    **_same(256, "max_target_positions max_source_positions model_max_length"),
    **_same(SLIDING_WINDOW, "sliding_window sliding_window_size attention_window_size"),
    **_same(SLIDING_WINDOW, "local_attention local_attention_window_len window_size"),
    **_same(SLIDING_WINDOW, "attention_chunk_size"),
    **_same(4, "num_experts num_local_experts moe_num_experts zero_expert_num"),
    **_same(8, "n_routed_experts"),
    **_same(2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts"),
    **_same(2, "n_group num_expert_group"),
    **_same(1, "topk_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    **_same(1, "first_k_dense_replace num_dense_layers"),
    **_same(32, "q_lora_rank o_lora_rank"),
    **_same(24, "kv_lora_rank"),
    **_same(16, "qk_nope_head_dim v_head_dim router_hidden_size"),
    **_same(8, "qk_rope_head_dim rotary_dim"),
    # Few index heads give scores of exactly zero (a sum of ReLUs); such ties make top-k arbitrary.
    **_same(16, "index_n_heads indexer_n_heads index_head_dim indexer_head_dim"),
    **_same(8, "index_topk"),
    **_same(2, "index_topk_blocks o_groups"),
    **_same(4, "index_block_size"),
    **_same(8, "mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank"),
    **_same(8, "mamba_chunk_size chunk_size mamba_n_heads mamba_num_heads n_mamba_heads"),
    **_same(16, "mamba_d_head mamba_head_dim mamba_headdim"),
    **_same(2, "n_groups linear_num_key_heads"),
    **_same(4, "linear_num_value_heads linear_num_heads"),
    **_same(16, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    **_same(8, "hidden_size_per_layer_input laurel_rank adapter_rank hc_lowrank gated_norm_rank"),
    **_same(16, "pronunciation_embed_dim shape_embed_dim num_centroids prompt_length"),
    **_same(32, "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab"),
    **_same(32, "rel_extent image_size samples_per_token output_channels nemo_conv_channels"),
    **_same(32, "ext_pw_out_channel depthwise_separable_out_channel"),
}
"""Field name of a configuration to its tiny value. A field smaller than that keeps its value."""

SPECIAL_TOKENS: Mapping[str, int] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHER_TOKENS: Mapping[str, int] = {
    "decoder_start_token_id": 1,
    "sep_token_id": 3,
    "eod_token_id": 3,
    "cls_token_id": 4,
    "mask_token_id": 5,
}

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")


def _stack(*layer_types: str, **others: object) -> dict[str, Any]:
    return {"num_hidden_layers": len(layer_types), "layer_types": list(layer_types), **others}


SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
DENSE_SPARSE = ["dense", "sparse"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ONE_CODEBOOK = {"num_codebooks": 1, "pad_token_id": VOCAB_SIZE, "bos_token_id": VOCAB_SIZE}

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    # Generation asks BltConfig for num_hidden_layers, which only its sub-configurations have.
    "blt": {"num_hidden_layers": 2},
    "cohere2_moe": _stack(SLIDING, FULL, mlp_layer_types=DENSE_SPARSE, num_shared_experts=1),
    "cohere_compass_text": _stack(
        SLIDING,
        FULL,
        rope_parameters=dict.fromkeys((SLIDING, FULL), ROPE | {"mrope_section": [4, 2, 2]}),
    ),
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 2.0},
        "ffn_config": {"moe_top_k": 2},
    },
    "deepseek_v2": {
        "first_k_dense_replace": 1,
        "num_experts_per_tok": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
    },
    "deepseek_v4": _stack(
        SLIDING,
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        mlp_layer_types=["hash_moe", "moe", "moe"],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        index_topk=4,
    ),
    # The first layer scores a position by its token alone, so that repeated tokens tie in the
    # top-k of a window shorter than the text.
    "doge": {"keep_window_size": 256},
    "dots1": _stack(
        SLIDING,
        FULL,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    ),
    "dots3_note_text": {
        "head_dim": 24,
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 8,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 8,
        "sliding_window": SLIDING_WINDOW,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": _stack(
        *(SLIDING, FULL) * 2,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    ),
    "gemma3n_vision": {"architecture": "test_resnet"},
    "gemma4_text": _stack(*(SLIDING, FULL) * 2, num_kv_shared_layers=2, global_head_dim=32),
    "gemma4": {
        "text_config": {
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 48,
        }
    },
    "gemma4_unified_text": _stack(SLIDING, FULL, global_head_dim=32),
    "glm_moe_dsa": _stack(
        *("indexed_attention",) * 3,
        mlp_layer_types=["dense", "sparse", "sparse"],
        indexer_types=["full", "full", "shared"],
    ),
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoe_swa": {"shared_intermediate_size": 48},
    "granitemoehybrid": _stack(LINEAR, FULL),
    "granitemoeshared": {"shared_intermediate_size": 48},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "inkling_text": {"mlp_layer_types": DENSE_SPARSE},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "laguna": _stack(
        SLIDING,
        FULL,
        sliding_window=SLIDING_WINDOW,
        mlp_layer_types=DENSE_SPARSE,
        num_attention_heads_per_layer=[8, 4],
    ),
    "lfm2": _stack("conv", FULL),
    "lfm2_moe": _stack("conv", FULL),
    "llama4_text": {"moe_layers": [1, 3]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "mellum": _stack(SLIDING, FULL, mlp_layer_types=["sparse", "sparse"]),
    "minimax_m3_vl_text": _stack(FULL, "minimax_m3_sparse", mlp_layer_types=DENSE_SPARSE),
    "ministral": _stack(SLIDING, FULL, head_dim=16),
    # Only the cache applies the window; the forward without a cache does not.
    "moshi": {"sliding_window": 256},
    "musicgen_decoder": ONE_CODEBOOK,
    "musicgen_melody_decoder": ONE_CODEBOOK,
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "heads_per_ngram": 4,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "rwkv": {"attention_hidden_size": 64},
    "xlm": {"causal": True},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"initializer_range": 0.02},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": [LINEAR, "hybrid"] * 2},
    # The chunked scan clamps the time step from below, the one-token update does not.
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": [LINEAR, "hybrid"] * 2,
        "time_step_min": 1e-9,
    },
    "zaya": _stack(
        "hybrid", "hybrid_sliding", sliding_window=SLIDING_WINDOW, num_experts_per_tok=1
    ),
}
"""Model type of a configuration (or sub-configuration) to the values that the generic rules miss.

A nested mapping goes to the sub-configuration of that field.
"""

EMBEDDING_STD = 0.06
EMBEDDING_STDS: Mapping[str, float] = {
    **_same(0.02, "bert-generation gemma2 gemma3 gemma3_text gemma4_unified gemma4_unified_text"),
    **_same(0.02, "xlm"),
    **_same(0.2, "ctrl xlnet"),
    **_same(0.6, "bert blenderbot-small ernie openai-gpt pegasus roc_bert zaya"),
    **_same(1.0, "marian musicgen musicgen_melody"),
}
"""Families whose greedy continuation repeats one token at the usual embedding scale."""

MATRIX_GAIN = 3.0
# Its 16 recurrent layer calls amplify the rounding error of a larger gain to 1e-2.
MATRIX_GAINS: Mapping[str, float] = {"hrm_text": 1.0}

DRAFTER = (
    "drafts for a target model: forward takes its inputs_embeds and shared_kv_states, not input_ids"
)
UNSUPPORTED: Mapping[str, str] = {"gemma4_assistant": DRAFTER, "gemma4_unified_assistant": DRAFTER}


def family_names() -> list[str]:
    """Every name that ``AutoModelForCausalLM`` maps to a model class, in the registry's order."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def model_class(name: str) -> type[PreTrainedModel]:
    """The class that ``AutoModelForCausalLM`` builds for the family ``name``."""
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise Unsupported(name, "not a causal-LM family of the installed transformers")
    if name in UNSUPPORTED:
        raise Unsupported(name, UNSUPPORTED[name])
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])


def tiny_config(name: str) -> PreTrainedConfig:
    """The shrunken configuration from which ``tiny_model(name)`` is built."""
    wanted = model_class(name).config_class
    config = _shrink(CONFIG_MAPPING[name], {})
    parts = [part for part in vars(config).values() if type(part) is wanted]
    return parts[0] if parts else config


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A float32 CPU model of the family ``name`` in eval mode; equal seeds give equal weights."""
    config = tiny_config(name)
    with random.fork_rng(devices=[]), torch.no_grad():  # pyright: ignore[reportUnknownMemberType]
        random.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
        model = _build(name, config)
        _roughen(
            model,
            embedding_std=EMBEDDING_STDS.get(name, EMBEDDING_STD),
            matrix_gain=MATRIX_GAINS.get(name, MATRIX_GAIN),
        )
    return model.eval()


def _build(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        model = model_class(name)(config)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise Unsupported(name, f"an optional package is missing: {reason}") from error
    generation = cast(Any, model.generation_config)
    for key, token in SPECIAL_TOKENS.items():
        setattr(generation, key, getattr(config, key, None) or token)
    generation.decoder_start_token_id = generation.pad_token_id or generation.bos_token_id
    generation.num_return_sequences = 1
    return model


def _shrink(config_class: type[PreTrainedConfig], extra: Mapping[str, Any]) -> PreTrainedConfig:
    override = {**OVERRIDES.get(config_class.model_type, {}), **extra}
    full = config_class()
    defaults = {field.name: _stored(full, field.name) for field in dataclasses.fields(config_class)}
    values = _layers(defaults) | _sizes(defaults) | _tokens(defaults) | _switches(defaults)
    for key, part in vars(full).items():
        if isinstance(part, PreTrainedConfig):
            values[key] = _shrink(type(part), override.pop(key, {}))
    return config_class(**(values | override))


def _stored(config: PreTrainedConfig, field: str) -> Any:
    """The value of a field, read past the guards that heterogeneous configurations put on it."""
    return vars(config).get(config.attribute_map.get(field, field))


def _sizes(defaults: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {
        key: _at_most(SIZES[key], value)
        for key, value in defaults.items()
        if key in SIZES and value is not None
    }
    if "kv_lora_rank" in defaults:  # latent attention expands one key per query head
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
    return sizes


def _at_most(tiny: Any, full: Any) -> Any:
    return min(tiny, full) if isinstance(full, int) else tiny


def _layers(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the first layer of every kind, by the per-layer lists of the full-size configuration."""
    counts = [key for key in LAYER_COUNTS if defaults.get(key) is not None]
    if not counts:
        return {}
    lists = {key: value for key, value in defaults.items() if _has(value, defaults[counts[0]])}
    kept = _first_of_each(list(zip(*lists.values(), strict=True)))
    chosen = {key: [value[i] for i in kept] for key, value in lists.items()}
    return chosen | dict.fromkeys(counts, len(kept))


def _has(value: Any, items: int) -> bool:
    return isinstance(value, list | tuple) and len(cast("list[Any]", value)) == items


def _first_of_each(kinds: Sequence[tuple[Any, ...]]) -> list[int]:
    firsts = sorted({kinds.index(kind) for kind in kinds})[:MAX_LAYERS]
    return firsts if len(firsts) > 1 else [0, 0]


def _tokens(defaults: Mapping[str, Any]) -> dict[str, Any]:
    special = {key: token for key, token in SPECIAL_TOKENS.items() if key in defaults}
    others = [key for key, value in sorted(defaults.items()) if _is_token(key, value)]
    markers = {key: FIRST_MEDIA_TOKEN + i for i, key in enumerate(others)}
    known = {key: OTHER_TOKENS[key] for key in others if key in OTHER_TOKENS}
    forced = {key: None for key in defaults if key.startswith("forced_")}
    return markers | known | special | forced


def _is_token(key: str, value: object) -> bool:
    return key.endswith(("_token_id", "_token_index")) and isinstance(value, int)


def _switches(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """No dropout, and the causal side of models that can also be encoders."""
    drops = [key for key, value in defaults.items() if "drop" in key and isinstance(value, float)]
    decoder = "is_decoder" in defaults and not defaults["is_encoder_decoder"]
    return dict.fromkeys(drops, 0.0) | ({"is_decoder": True} if decoder else {})


def _roughen(model: PreTrainedModel, embedding_std: float, matrix_gain: float) -> None:
    """Widen the small normal initialisation and disturb every tensor that starts out constant."""
    tables = [part for part in model.modules() if isinstance(part, Embedding)]
    embeddings = {id(table.weight) for table in tables}
    for tensor in [*model.parameters(), *_learned_buffers(model)]:
        if tensor.numel() == 1 or tensor.std() < 1e-6:
            tensor.add_(torch.randn_like(tensor), alpha=VECTOR_NOISE)
        elif tensor.ndim > 1 and tensor.std() < 0.1:
            matrix_std = matrix_gain / math.sqrt(tensor.shape[-1])
            wanted = embedding_std if id(tensor) in embeddings else matrix_std
            tensor.mul_(wanted / tensor.std())
    for table in tables:
        _fill_padding_row(table)


def _fill_padding_row(table: Embedding) -> None:
    """The row starts as zeros; a generated pad token would tie every top-k score at zero."""
    if table.padding_idx is not None:
        table.weight[table.padding_idx].normal_(std=float(table.weight.std()))


def _learned_buffers(model: PreTrainedModel) -> Iterator[Tensor]:
    """Routing biases and layer scales; other buffers (decay tables, frequencies) are derived."""
    for name, buffer in model.named_buffers():
        if name.endswith(("bias", "biases", "scalar")) and buffer.is_floating_point():
            yield buffer
