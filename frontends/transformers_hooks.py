"""Capture through transformers' own extension points.

A registered attention function emits ``fxgraft::attention`` and a registered mask function emits
``fxgraft::causal_mask`` (raised into the attention's arguments afterwards), so that no mask
tensors are built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any, cast

import torch
from torch import nn

from fxgraft.errors import CaptureError

_NAME = "fxgraft"
# What the attention functions of transformers receive that does not change the result here.
_IGNORED = frozenset({
    "dropout", "output_attentions", "use_cache", "cache", "cache_position", "past_key_values",
    "position_ids", "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
    "max_length_k", "layer_idx", "implementation", "position_embeddings", "output_hidden_states",
    "return_dict", "is_tracing", "num_items_in_batch", "output_router_logits", "labels",
    "logits_to_keep", "input_ids", "inputs_embeds", "deterministic", "target_dtype",
})  # fmt: skip


class UnknownAttentionError(CaptureError):
    """A model gives its attention something that ``fxgraft::attention`` has no argument for."""


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is a transformers model."""
    return hasattr(model, "set_attn_implementation") and hasattr(model, "config")


@contextlib.contextmanager
def emit_ops(model: nn.Module) -> Generator[None]:
    """While active, the model's attention, masks and recurrences emit fxgraft ops."""
    _register()
    with _attention_implementation(cast(Any, model), _NAME), emit_recurrences(model):
        yield


@contextlib.contextmanager
def emit_recurrences(model: nn.Module) -> Generator[None]:
    """While active, only the model's recurrences emit fxgraft ops."""
    from fxgraft.frontends.recurrent import emit_recurrent_ops

    with emit_recurrent_ops(model):
        yield


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    cast(Any, AttentionInterface).register(_NAME, _attention)
    cast(Any, AttentionMaskInterface).register(_NAME, _mask)


@contextlib.contextmanager
def _attention_implementation(model: Any, name: str) -> Generator[None]:
    configs = _configs(model)
    previous = [getattr(config, "_attn_implementation_internal", None) for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, value in zip(configs, previous, strict=True):
            config._attn_implementation_internal = value


def _configs(model: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [B, H, S, D] in, [B, S, H, D] out."""
    unknown = [k for k, v in kwargs.items() if v is not None and k not in _IGNORED]
    if unknown:
        raise UnknownAttentionError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to its attention, "
            "which fxgraft::attention does not know",
            "capture the model with attn_implementation='eager', or report the model class",
        )
    if attention_mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    else:
        causal, sliding_window = False, None
    output = torch.ops.fxgraft.attention(
        query,
        key,
        value,
        None,
        _join(attention_mask, position_bias),
        s_aux if s_aux is not None else sinks,
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        is_causal=causal,
        window=sliding_window if causal else None,
        softcap=float(softcap or 0.0),
    )
    return output.transpose(1, 2).contiguous(), None


def _join(mask: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None or bias is None:
        return bias if mask is None else mask
    if mask.dtype != torch.bool:
        return mask + bias
    return torch.where(mask, bias, torch.finfo(bias.dtype).min)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """transformers' mask interface: a [B, 1, S, T] keep-mask described by one op."""
    from transformers import masking_utils
    from transformers.masking_utils import causal_mask_function

    function = mask_function or causal_mask_function
    rule = _visibility(function)
    if rule is None:
        kwargs["allow_is_causal_skip"] = False
        kwargs["allow_is_bidirectional_skip"] = False
        return cast(Any, masking_utils).sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=function, attention_mask=attention_mask,
            device=device, **kwargs,
        )  # fmt: skip
    if attention_mask is None:
        attention_mask = torch.ones((batch_size, kv_length), dtype=torch.bool, device=device)
    return torch.ops.fxgraft.causal_mask(attention_mask.bool(), q_length, **rule)


def _visibility(function: Callable[..., Any]) -> dict[str, Any] | None:
    """What a transformers mask function lets a query see, or None for an unknown rule."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if function is causal_mask_function:
        return {"is_causal": True}
    if function is bidirectional_mask_function:
        return {"is_causal": False}
    variables = dict(
        zip(
            function.__code__.co_freevars,
            (cell.cell_contents for cell in function.__closure__ or ()),
            strict=True,
        )
    )
    name = function.__qualname__
    if name == "and_masks.<locals>.and_mask":
        return _both([_visibility(part) for part in variables["mask_functions"]])
    if name == "sliding_window_overlay.<locals>.inner_mask":
        # Models build masks that no layer reads, from windows that mean "none".
        window = variables["sliding_window"]
        return {"window": window} if isinstance(window, int) and window > 0 else None
    if name == "chunked_overlay.<locals>.inner_mask":
        return {"chunk": variables["chunk_size"]}
    return None


def _both(rules: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    joined: dict[str, Any] = {}
    for rule in rules:
        if rule is None or joined.keys() & rule.keys():
            return None
        joined |= rule
    return joined if joined.get("is_causal") else None
