"""Tiny random models of the transformers families with a recurrence or a short convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import nn

VOCABULARY = 64
_BASE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MAMBA = {
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4,
    "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1,
}  # fmt: skip
_MAMBA2 = {
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 8,
    "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4,
}  # fmt: skip
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
_MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1,
}  # fmt: skip
_LATENT = {
    "linear_num_heads": 2, "linear_head_dim": 8, "num_key_value_heads": 4, "kv_lora_rank": 8,
    "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "n_shared_experts": 1, "num_shared_experts": 1,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip
_INKLING = {
    "unpadded_vocab_size": 60, "layer_types": ["hybrid_sliding", "hybrid"], "d_rel": 4,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "sliding_window_size": 8, "rel_extent": 16, "conv_kernel_size": 4,
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A tiny model and the ops that its graph must hold.

    Attributes:
        name: prefix of its transformers classes.
        config: what differs from the base configuration.
        ops: name of each recurrent op and how often it must appear.
        fast: whether the default test run covers it.
    """

    name: str
    config: dict[str, Any]
    ops: dict[str, int]
    fast: bool = False


FAMILIES = [
    Family("Mamba", {"state_size": 8}, {"causal_conv1d": 2, "selective_scan": 2}, fast=True),
    Family("FalconMamba", {"state_size": 8}, {"causal_conv1d": 2, "selective_scan": 2}),
    Family("Jamba", _MAMBA, {"causal_conv1d": 1, "selective_scan": 1}),
    Family(
        "Zamba",
        {
            **_MAMBA, "n_mamba_heads": 2, "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
        },
        {"causal_conv1d": 4, "selective_scan": 8},
    ),
    Family(
        "Mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
        {"causal_conv1d": 2, "ssd": 2},
        fast=True,
    ),
    Family("Bamba", {**_MAMBA2, "attn_layer_indices": [1]}, {"causal_conv1d": 1, "ssd": 1}),
    Family("FalconH1", {**_MAMBA2, "mamba_d_ssm": 64}, {"causal_conv1d": 2, "ssd": 2}),
    Family(
        "GraniteMoeHybrid",
        {
            **_MAMBA2, "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16,
        },
        {"causal_conv1d": 1, "ssd": 1},
    ),
    Family(
        "NemotronH",
        {
            "layers_block_type": ["linear_attention", "full_attention"], "mamba_num_heads": 8,
            "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 4,
        },
        {"causal_conv1d": 1, "ssd": 1},
    ),
    Family(
        "Zamba2",
        {
            "layers_block_type": ["linear_attention", "hybrid"], "mamba_d_state": 8,
            "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 2, "chunk_size": 4,
            "adapter_rank": 4,
        },
        {"causal_conv1d": 2, "ssd": 2},
    ),
    Family(
        "MiniMax",
        {
            "layer_types": ["linear_attention", "full_attention"], "block_size": 4,
            "num_local_experts": 2, "num_experts_per_tok": 1,
        },
        {"ssd": 1},
    ),
    Family("Qwen3Next", {**_LINEAR, **_MOE}, {"causal_conv1d": 1, "gated_delta_rule": 1}),
    Family("Qwen3_5", _LINEAR, {"causal_conv1d": 1, "gated_delta_rule": 1}),
    Family("Qwen3_5Moe", {**_LINEAR, **_MOE}, {"causal_conv1d": 1, "gated_delta_rule": 1}),
    Family("OlmoHybrid", _LINEAR, {"causal_conv1d": 1, "gated_delta_rule": 1}, fast=True),
    Family("KimiLinear", _LATENT, {"causal_conv1d": 1, "gated_delta_rule": 1}),
    Family("BailingHybrid", _LATENT, {"causal_conv1d": 1, "gated_delta_rule": 1}),
    Family("Lfm2", {"layer_types": ["conv", "full_attention"]}, {"causal_conv1d": 1}),
    Family(
        "Lfm2Moe",
        {
            "layer_types": ["conv", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16, "num_dense_layers": 1,
        },
        {"causal_conv1d": 1},
    ),
    Family("Lfm3", {"layer_types": ["conv", "full_attention"]}, {"causal_conv1d": 1}),
    Family("Inkling", _INKLING, {"causal_conv1d": 8}),
    Family("Inkling2", _INKLING, {"causal_conv1d": 6, "causal_pad": 2}),
    Family(
        "Zaya",
        {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 8, "num_experts": 2},
        {"causal_conv1d": 2, "causal_pad": 4},
    ),
    Family(
        "RecurrentGemma",
        {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3},
        {"causal_conv1d": 2, "linear_recurrence": 2},
    ),
    Family(
        "Rwkv",
        {"attention_hidden_size": 48, "rescale_every": 1, "layer_norm_epsilon": 1e-8},
        {"causal_pad": 4, "wkv": 2},
        fast=True,
    ),
    Family("xLSTM", {"num_heads": 2, "chunk_size": 8}, {"mlstm": 2}, fast=True),
]  # fmt: skip


def build(family: Family) -> nn.Module:
    """The model in eval mode, its weights large enough that every part changes the logits."""
    library = cast(Any, transformers)
    prefix = family.name
    config_class = getattr(library, f"{prefix}TextConfig", None) or getattr(
        library, f"{prefix}Config"
    )
    known = set(config_class().to_dict()) | set(family.config)
    values = {key: value for key, value in {**_BASE, **family.config}.items() if key in known}
    torch.random.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    model = cast(nn.Module, getattr(library, f"{prefix}ForCausalLM")(config_class(**values)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()
