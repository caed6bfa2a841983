"""Tiny random transformers models for tests, one builder per family."""

from __future__ import annotations

from typing import Any, cast

import torch
import transformers
from torch import nn

VOCABULARY = 128


def llama(**changes: Any) -> nn.Module:
    """A Llama with grouped queries: 4 query heads, 2 key/value heads."""
    return _build("Llama", _decoder(), changes)


def mistral(**changes: Any) -> nn.Module:
    """A Mistral with a sliding window of 6 tokens."""
    return _build("Mistral", {**_decoder(), "sliding_window": 6, "head_dim": 16}, changes)


def gemma2(**changes: Any) -> nn.Module:
    """A Gemma 2: soft caps, alternating windows, norms around each part."""
    return _build("Gemma2", {**_decoder(), "sliding_window": 6, "head_dim": 16}, changes)


def gpt2(**changes: Any) -> nn.Module:
    """A GPT-2: learned positions, one merged query/key/value projection."""
    config = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return _build("GPT2", config, changes, head="LMHeadModel")


def opt(**changes: Any) -> nn.Module:
    """An OPT: learned positions counted from the attention mask."""
    config = {
        "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 64,
    }  # fmt: skip
    return _build("OPT", config, changes)


def qwen2(**changes: Any) -> nn.Module:
    """A Qwen 2: query, key and value have biases."""
    return _build("Qwen2", _decoder(), changes)


def olmo2(**changes: Any) -> nn.Module:
    """An OLMo 2: queries and keys are normalised over all heads together."""
    return _build("Olmo2", _decoder(), changes)


def phi(**changes: Any) -> nn.Module:
    """A Phi: half of every head rotates; attention and MLP side by side."""
    return _build("Phi", {**_decoder(), "num_key_value_heads": 4}, changes)


def phi3(**changes: Any) -> nn.Module:
    """A Phi 3: merged query/key/value and merged gate/up."""
    return _build("Phi3", _decoder(), changes)


def gpt_neox(**changes: Any) -> nn.Module:
    """A GPT-NeoX: query, key and value of a head side by side; a quarter of it rotates."""
    config = _decoder()
    del config["num_key_value_heads"]
    return _build("GPTNeoX", config, changes)


def mixtral(**changes: Any) -> nn.Module:
    """A Mixtral: every MLP is a mixture of four experts."""
    return _build("Mixtral", {**_decoder(), "num_local_experts": 4}, changes)


def gpt_oss(**changes: Any) -> nn.Module:
    """A GPT-OSS: sinks, windows in every other layer, experts with biases, gate/up interleaved."""
    config = {**_decoder(), "head_dim": 16, "sliding_window": 6, "num_local_experts": 4}
    return _build("GptOss", config, changes)


def mamba(**changes: Any) -> nn.Module:
    """A Mamba-1: fixed-size state only."""
    config = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "expand": 2}
    return _build("Mamba", config, changes)


def jamba(**changes: Any) -> nn.Module:
    """A Jamba: Mamba and attention layers mixed, mixture of experts."""
    config = {
        **_decoder(), "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4,
        "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    }  # fmt: skip
    return _build("Jamba", config, changes)


def _decoder() -> dict[str, Any]:
    return {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip


def _build(
    family: str, config: dict[str, Any], changes: dict[str, Any], head: str = "ForCausalLM"
) -> nn.Module:
    library = cast(Any, transformers)
    values = {
        "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "initializer_range": 0.2, **config, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(library, family + head)(getattr(library, family + "Config")(**values))
    return cast(nn.Module, model.eval())
