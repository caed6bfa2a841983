"""Launches the Triton kernels of paged attention."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

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
from fxgraft.kernels.paged_attention.gate import Gate
from fxgraft.kernels.paged_attention.gate_launch import (
    decode_gate,
    gate_block,
    gate_prompt,
    gate_refusal,
    prompt_tensors,
)
from fxgraft.kernels.paged_attention.inputs import Inputs, Rules, sizes_of
from fxgraft.kernels.paged_attention.prefill_kernel import prefill_kernel, write_kernel

_WIDEST = 256
# Query heads of a kv head times channels: what a program holds in registers.
_LARGEST_GROUP = 128 * 128
_ROTATED_AT_ONCE = 4096
# Floats of each of up to four warps: 64 registers of a thread, of which it needs two sets.
_ADDED_AT_ONCE = 2048


def supports(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor | None, gate: Gate | None = None
) -> bool:
    """Whether ``paged_attention`` takes these: dtypes, sizes, and how they lie."""
    if gate is not None and gate_refusal(gate, query.shape[1]) is not None:
        return False
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
    chosen: Tensor | None = None,
    gated: Tensor | None = None,
    key_sum_cache: Tensor | None = None,
    slots: Tensor | None = None,
    chosen_cache: Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    interleaved: bool = False,
    longest_past: int = -1,
    keep: int = 0,
    factor: float = 1.0,
) -> Tensor:
    """Attend and write; arguments and result are those of ``fxgraft.kernels.paged_attention.op``.

    One token per row takes one kernel, which suppresses heads too. New tokens without a past go to
    the library's attention where it knows the rules, and all others through a kernel that reads
    blocks; two small kernels then suppress heads. Nothing waits for the device. ``supports`` says
    which arguments are taken.
    """
    if cos is None or sin is None:
        cos = sin = None
    else:
        cos, sin = (angle if angle.stride(-1) == 1 else angle.contiguous() for angle in (cos, sin))
        sin = sin if sin.stride() == cos.stride() else sin.contiguous()
        cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    inputs = Inputs(
        query, key, value, key_cache, value_cache, table.contiguous(), past.contiguous(),
        cos, sin, sinks, Gate.of(chosen, gated, key_sum_cache, slots, chosen_cache, keep, factor),
    )  # fmt: skip
    rules = Rules(scale, window, softcap, interleaved)
    if query.shape[2] == 1:
        return _decode(inputs, rules)
    if longest_past == 0 and _library_knows(inputs, rules):
        return _prefill_by_library(inputs, rules)
    return _prefill(inputs, rules)


def _angles(inputs: Inputs, interleaved: bool) -> tuple[tuple[int, int], dict[str, Any]]:
    """The strides of rows and tokens of the angles, and the kernels' options for them."""
    cos = inputs.cos
    if cos is None:
        return (0, 0), {"ROTARY": 0, "INTERLEAVED": False}
    row = cos.stride(0) if cos.shape[0] > 1 else 0
    return (row, cos.stride(2)), {"ROTARY": cos.shape[-1], "INTERLEAVED": interleaved}


def _decode(inputs: Inputs, rules: Rules) -> Tensor:
    query, key, value = inputs.query, inputs.key, inputs.value
    caches = inputs.key_cache, inputs.value_cache
    batch, heads = query.shape[:2]
    kv_heads = key.shape[1]
    group = heads // kv_heads
    sizes = sizes_of(inputs)
    block_v = sizes["BLOCK_V"]
    config = decode_config(query.dtype, batch, kv_heads, group, max(sizes["BLOCK_D"], block_v))
    block_g = max(16, power_of_2(group)) if config.dots else 1
    # A table that holds less than every split's least part never needs all splits.
    capacity = inputs.table.shape[1] * sizes["PAGE"]
    splits = min(config.splits, power_of_2(blocks_of(capacity, config.least)))
    most = power_of_2(max(splits, blocks_of(capacity, config.longest)))
    output = reference.empty_output(query, value)
    sums = batch * heads * most
    partial = torch.empty(sums * block_v, dtype=torch.float32, device=query.device)
    gate = decode_gate(inputs)
    fields = 2 if gate.scores is None else 3
    statistics = torch.empty(sums * fields, dtype=torch.float32, device=query.device)
    angle_strides, angle_options = _angles(inputs, rules.interleaved)
    added_at_once = min(config.warps, 4) * _ADDED_AT_ONCE
    added_at_once = min(config.warps, 4) * _ADDED_AT_ONCE
    over(decode_kernel, most, kv_heads, batch)(
        query, key, value, *caches, inputs.table, inputs.past,
        inputs.cos, inputs.sin, inputs.sinks, output, partial, statistics,
        arrival_counters(query.device, batch * (kv_heads if fields == 2 else kv_heads + 1)),
        *gate.tensors, gate.scores, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
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
        LANES=config.lanes,
        STAGES=config.stages,
        CHUNK=max(1, min(most, added_at_once // (power_of_2(group) * block_v))),
        PREFETCH=0 if gate.skips and splits == 1 else config.prefetch,
        KV_HEADS=kv_heads,
        **gate.options,
        num_warps=config.warps,
        **sizes,
        **angle_options,
        **launch_options(query.device),
    )  # fmt: skip
    return output


def _library_knows(inputs: Inputs, rules: Rules) -> bool:
    """Whether the library's attention is right, and fast, for tokens without a past."""
    window = rules.window is not None and rules.window < inputs.query.shape[2]
    plain = rules.softcap == 0 and inputs.sinks is None and not window
    one_width = inputs.query.shape[3] == inputs.value.shape[3]
    return plain and one_width and inputs.query.shape[3] % 8 == 0


def _prefill_by_library(inputs: Inputs, rules: Rules) -> Tensor:
    query, key, block_sums = _write(inputs, rules, keeps_key=True)
    rotated = query
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
    gate_prompt(inputs, rules, rotated, result, block_sums)
    return result


def _prefill(inputs: Inputs, rules: Rules) -> Tensor:
    query, _, block_sums = _write(inputs, rules, keeps_key=False)
    batch, heads, tokens, _ = query.shape
    output = reference.empty_output(query, inputs.value)
    sizes = sizes_of(inputs)
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
    gate_prompt(inputs, rules, query, output, block_sums)
    return output


def _write(
    inputs: Inputs, rules: Rules, *, keeps_key: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Write the new tokens to the caches.

    Returns:
        Rotated queries, keys (rotated if they are kept), and the sums of the chosen keys of each
        block of tokens, if the gate needs them.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    caches = inputs.key_cache, inputs.value_cache
    batch, heads, tokens, _ = query.shape
    kv_heads = key.shape[1]
    rotates = inputs.cos is not None
    new_query = reference.empty_output(query, query) if rotates else None
    new_key = reference.empty_output(key, key) if rotates and keeps_key else None
    sizes = sizes_of(inputs)
    angle_strides, angle_options = _angles(inputs, rules.interleaved)
    block_s = max(1, _ROTATED_AT_ONCE // max(sizes["BLOCK_D"], sizes["BLOCK_V"]))
    block_s = min(block_s, power_of_2(tokens))
    chosen = flags = block_sums = None
    if inputs.gate is not None:
        block_s = gate_block(inputs)
        chosen, flags, block_sums = prompt_tensors(inputs, inputs.gate)
    grid = (blocks_of(tokens, block_s), 2 * kv_heads + (heads if rotates else 0), batch)
    over(write_kernel, *grid)(
        query, key, value, *caches, inputs.table, inputs.past, inputs.cos, inputs.sin,
        new_query, new_key, chosen, flags, block_sums,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *caches[0].stride()[:3], *caches[1].stride()[:3],
        inputs.table.stride(0), *angle_strides, tokens, heads, kv_heads,
        BLOCK_S=block_s,
        num_warps=4,
        **sizes,
        **angle_options,
        **launch_options(query.device),
    )  # fmt: skip
    query = query if new_query is None else new_query
    return query, key if new_key is None else new_key, block_sums
