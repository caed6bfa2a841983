"""Launches the Triton kernels of paged attention."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fxgraft.kernels.launch import (
    DTYPES,
    arrival_counters,
    blocks_of,
    launch_options,
    over,
    power_of_2,
)
from fxgraft.kernels.paged_attention import reference
from fxgraft.kernels.paged_attention.config import decode_config, prefill_config
from fxgraft.kernels.paged_attention.decode_kernel import decode_kernel
from fxgraft.kernels.paged_attention.prefill_kernel import prefill_kernel, write_kernel

_WIDEST = 256
# Query heads of a kv head times channels: what a program holds in registers.
_LARGEST_GROUP = 128 * 128
_ROTATED_AT_ONCE = 4096
# Floats: 128 registers of each thread of four warps.
_ADDED_AT_ONCE = 16384


@dataclass(frozen=True)
class _Inputs:
    """The tensors of a call, as ``fxgraft.kernels.paged_attention.op`` describes them."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_cache: Tensor
    value_cache: Tensor
    table: Tensor
    past: Tensor
    cos: Tensor | None
    sin: Tensor | None
    sinks: Tensor | None


@dataclass(frozen=True)
class _Rules:
    """The options of a call."""

    scale: float
    window: int | None
    softcap: float
    interleaved: bool


def supports(query: Tensor, key: Tensor, value: Tensor, cos: Tensor | None) -> bool:
    """Whether ``paged_attention`` takes these: dtypes, sizes, and how they lie."""
    group, widest = query.shape[1] // key.shape[1], max(query.shape[3], value.shape[3])
    if query.dtype not in DTYPES or query.numel() == 0 or widest > _WIDEST:
        return False
    if group * power_of_2(widest) > _LARGEST_GROUP:
        return False
    if any(tensor.stride(-1) != 1 for tensor in (query, key, value)):
        return False
    if cos is None:
        return True
    return cos.dtype in DTYPES and cos.shape[-1] % 2 == 0 and cos.shape[-1] <= query.shape[3]


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    table: Tensor,
    past: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    interleaved: bool = False,
    longest_past: int = -1,
) -> Tensor:
    """Attend and write; arguments and result are those of ``fxgraft.kernels.paged_attention.op``.

    One token per row takes one kernel. New tokens without a past go to the library's attention
    where it knows the rules, and all others through a kernel that reads blocks. Nothing waits for
    the device. ``supports`` says which arguments are taken.
    """
    if cos is None or sin is None:
        cos = sin = None
    else:
        cos, sin = (angle if angle.stride(-1) == 1 else angle.contiguous() for angle in (cos, sin))
        sin = sin if sin.stride() == cos.stride() else sin.contiguous()
        cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    inputs = _Inputs(
        query, key, value, key_cache, value_cache, table.contiguous(), past.contiguous(),
        cos, sin, sinks,
    )  # fmt: skip
    rules = _Rules(scale, window, softcap, interleaved)
    if query.shape[2] == 1:
        return _decode(inputs, rules)
    if longest_past == 0 and _library_knows(inputs, rules):
        return _prefill_by_library(inputs, rules)
    return _prefill(inputs, rules)


def _sizes(inputs: _Inputs) -> dict[str, Any]:
    """The sizes that all kernels are compiled for."""
    head_dim, value_dim = inputs.query.shape[3], inputs.value.shape[3]
    return {
        "PAGE": inputs.key_cache.shape[2],
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": max(16, power_of_2(head_dim)),
        "BLOCK_V": max(16, power_of_2(value_dim)),
    }


def _angles(inputs: _Inputs, interleaved: bool) -> tuple[tuple[int, int], dict[str, Any]]:
    """The strides of rows and tokens of the angles, and the kernels' options for them."""
    cos = inputs.cos
    if cos is None:
        return (0, 0), {"ROTARY": 0, "INTERLEAVED": False}
    row = cos.stride(0) if cos.shape[0] > 1 else 0
    return (row, cos.stride(2)), {"ROTARY": cos.shape[-1], "INTERLEAVED": interleaved}


def _decode(inputs: _Inputs, rules: _Rules) -> Tensor:
    query, key, value = inputs.query, inputs.key, inputs.value
    caches = inputs.key_cache, inputs.value_cache
    batch, heads = query.shape[:2]
    kv_heads = key.shape[1]
    group = heads // kv_heads
    sizes = _sizes(inputs)
    block_g = 1 if group == 1 else max(16, power_of_2(group))
    block_v = sizes["BLOCK_V"]
    config = decode_config(query.dtype, batch, kv_heads, group, max(sizes["BLOCK_D"], block_v))
    # A table that holds less than every split's least part never needs all splits.
    capacity = inputs.table.shape[1] * sizes["PAGE"]
    splits = min(config.splits, power_of_2(blocks_of(capacity, config.least)))
    most = power_of_2(max(splits, blocks_of(capacity, config.longest)))
    output = reference.empty_output(query, value)
    sums = batch * heads * most
    partial = torch.empty(sums * block_v, dtype=torch.float32, device=query.device)
    statistics = torch.empty(sums * 2, dtype=torch.float32, device=query.device)
    angle_strides, angle_options = _angles(inputs, rules.interleaved)
    over(decode_kernel, most, kv_heads, batch)(
        query, key, value, *caches, inputs.table, inputs.past,
        inputs.cos, inputs.sin, inputs.sinks, output, partial, statistics,
        arrival_counters(query.device, batch * kv_heads),
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        *caches[0].stride()[:3], *caches[1].stride()[:3],
        inputs.table.stride(0), angle_strides[0],
        caches[0].shape[0], inputs.table.shape[1], rules.scale,
        GROUP=group,
        WINDOW=rules.window or 0,
        SOFTCAP=rules.softcap,
        HEADS=power_of_2(group),
        BLOCK_G=block_g,
        SPLITS=splits,
        MOST=most,
        LEAST=config.least,
        LONGEST=config.longest,
        TILE=config.tile,
        STAGES=config.stages,
        CHUNK=max(1, min(most, _ADDED_AT_ONCE // (power_of_2(group) * block_v))),
        PREFETCH=config.prefetch,
        num_warps=config.warps,
        **sizes,
        **angle_options,
        **launch_options(query.device),
    )  # fmt: skip
    return output


def _library_knows(inputs: _Inputs, rules: _Rules) -> bool:
    """Whether the library's attention is right, and fast, for tokens without a past."""
    window = rules.window is not None and rules.window < inputs.query.shape[2]
    plain = rules.softcap == 0 and inputs.sinks is None and not window
    one_width = inputs.query.shape[3] == inputs.value.shape[3]
    return plain and one_width and inputs.query.shape[3] % 8 == 0


def _prefill_by_library(inputs: _Inputs, rules: _Rules) -> Tensor:
    query, key = _write(inputs, rules, keeps_key=True)
    value = inputs.value
    group = query.shape[1] // key.shape[1]
    if query.dtype == torch.float32 and group > 1:
        # The library's fused float32 kernel takes as many key heads as query heads.
        key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    result = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=rules.scale, enable_gqa=group > 1
    )
    if not result.transpose(1, 2).is_contiguous():
        result = reference.empty_output(query, value).copy_(result)
    if query.shape[0] > 1:
        result.masked_fill_((inputs.past < 0).view(-1, 1, 1, 1), 0)
    return result


def _prefill(inputs: _Inputs, rules: _Rules) -> Tensor:
    query, _ = _write(inputs, rules, keeps_key=False)
    batch, heads, tokens, _ = query.shape
    output = reference.empty_output(query, inputs.value)
    sizes = _sizes(inputs)
    caches = inputs.key_cache, inputs.value_cache
    config = prefill_config(query.dtype, tokens, max(sizes["BLOCK_D"], sizes["BLOCK_V"]))
    over(prefill_kernel, blocks_of(tokens, config.block_m), heads, batch)(
        query, *caches, inputs.table, inputs.past, inputs.sinks, output,
        *query.stride()[:3], *caches[0].stride()[:3], *caches[1].stride()[:3],
        inputs.table.stride(0), tokens, rules.scale,
        GROUP=heads // inputs.key.shape[1],
        WINDOW=rules.window or 0,
        SOFTCAP=rules.softcap,
        BLOCK_M=config.block_m,
        TILE=config.tile,
        STAGES=config.stages,
        num_warps=config.warps,
        **sizes,
        **launch_options(query.device),
    )  # fmt: skip
    return output


def _write(inputs: _Inputs, rules: _Rules, *, keeps_key: bool) -> tuple[Tensor, Tensor]:
    """Write the new tokens to the caches; returns rotated queries, and keys if they are kept."""
    query, key, value = inputs.query, inputs.key, inputs.value
    caches = inputs.key_cache, inputs.value_cache
    batch, heads, tokens, _ = query.shape
    kv_heads = key.shape[1]
    rotates = inputs.cos is not None
    new_query = reference.empty_output(query, query) if rotates else None
    new_key = reference.empty_output(key, key) if rotates and keeps_key else None
    sizes = _sizes(inputs)
    angle_strides, angle_options = _angles(inputs, rules.interleaved)
    block_s = max(1, _ROTATED_AT_ONCE // max(sizes["BLOCK_D"], sizes["BLOCK_V"]))
    block_s = min(block_s, power_of_2(tokens))
    grid = (blocks_of(tokens, block_s), 2 * kv_heads + (heads if rotates else 0), batch)
    over(write_kernel, *grid)(
        query, key, value, *caches, inputs.table, inputs.past, inputs.cos, inputs.sin,
        new_query, new_key,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *caches[0].stride()[:3], *caches[1].stride()[:3],
        inputs.table.stride(0), *angle_strides, tokens, heads, kv_heads,
        BLOCK_S=block_s,
        num_warps=4,
        **sizes,
        **angle_options,
        **launch_options(query.device),
    )  # fmt: skip
    return query if new_query is None else new_query, key if new_key is None else new_key
