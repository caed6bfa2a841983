"""Launches what suppresses heads in the Triton kernels of paged attention."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxgraft.kernels.launch import blocks_of, launch_options, over, power_of_2
from fxgraft.kernels.paged_attention.gate import Gate
from fxgraft.kernels.paged_attention.inputs import Inputs, Rules, sizes_of
from fxgraft.kernels.paged_attention.prompt_gate import gate_kernel, share_kernel, sum_kernel

# Heads times channels: 16 registers of each thread of eight warps, for each of several tiles.
_SCORED_AT_ONCE = 4096
_MOST_HEADS = 128
_TILE = 64


@dataclass(frozen=True)
class DecodeGate:
    """What the kernel of one token per row gets.

    Attributes:
        tensors: chosen, gated, key_sums, slots, chosen_cache; None where it needs them not.
        scores: float32 [rows, heads] for shares of attention, or None.
        skips: whether it may leave kv heads out.
        options: its constants.
    """

    tensors: tuple[Tensor | None, ...]
    scores: Tensor | None
    skips: bool
    options: dict[str, Any]


def gate_refusal(gate: Gate, heads: int) -> str | None:
    """Why the kernels do not take a gate, None if they do."""
    sums, flags = gate.key_sums, gate.chosen_cache
    if heads > _MOST_HEADS:
        return f"over {_MOST_HEADS} heads are ranked"
    if sums is not None and (sums.dtype != torch.float32 or not sums.is_contiguous()):
        return "the summed keys are not float32, or not contiguous"
    return None if flags is None or flags.is_contiguous() else "chosen_cache is not contiguous"


def decode_gate(inputs: Inputs) -> DecodeGate:
    """The gate of one token per row; of a call without one, nothing is computed."""
    gate = inputs.gate
    if gate is None:
        options = {"BLOCK_H": 1, "SCORE_CHUNK": 1, "KEEP": 0, "FACTOR": 1.0}
        return DecodeGate((None,) * 5, None, False, options)
    batch, heads = inputs.query.shape[:2]
    block_h = power_of_2(heads)
    widest = max(sizes_of(inputs)["BLOCK_D"], sizes_of(inputs)["BLOCK_V"])
    options = {
        "BLOCK_H": block_h,
        "SCORE_CHUNK": min(widest, _SCORED_AT_ONCE // block_h),
        "KEEP": gate.keep,
        "FACTOR": gate.factor,
    }
    scores = None
    if gate.chosen_cache is not None:
        scores = torch.empty(batch * heads, dtype=torch.float32, device=inputs.query.device)
    skips = gate.factor == 0 and gate.key_sums is not None
    tensors = (
        _bytes(gate.chosen), _bytes(gate.gated), gate.key_sums, gate.slots,
        _bytes(gate.chosen_cache),
    )  # fmt: skip
    return DecodeGate(tensors, scores, skips, options)


def gate_block(inputs: Inputs) -> int:
    """Tokens of a program, in all kernels of a gated prompt; tensor cores take 16 or more."""
    sizes = sizes_of(inputs)
    most = _SCORED_AT_ONCE // max(sizes["BLOCK_D"], sizes["BLOCK_V"])
    return max(16, min(most, 64, power_of_2(inputs.query.shape[2])))


def prompt_tensors(inputs: Inputs, gate: Gate) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``chosen``, where it is kept, and room for the sums of each block's chosen keys."""
    batch, kv_heads, tokens, head_dim = inputs.key.shape
    sums = None
    if gate.key_sums is not None:
        shape = (batch, kv_heads, blocks_of(tokens, gate_block(inputs)), head_dim)
        sums = gate.key_sums.new_empty(shape)
    chosen = _bytes(gate.chosen)
    assert chosen is not None
    return chosen, _bytes(gate.chosen_cache), sums


def gate_prompt(
    inputs: Inputs, rules: Rules, query: Tensor, output: Tensor, block_sums: Tensor | None
) -> None:
    """Suppress heads in the outputs of several tokens per row, in place; nothing without a gate.

    Args:
        inputs, rules: of the call; the caches hold the new tokens.
        query: [B, H, S, D], rotated.
        output: [B, H, S, Dv], laid out as the op says.
        block_sums: as ``write_kernel`` leaves them.
    """
    gate = inputs.gate
    if gate is None:
        return
    batch, heads, tokens, _ = query.shape
    scores = torch.empty((batch, tokens, heads), dtype=torch.float32, device=query.device)
    sizes = sizes_of(inputs)
    chosen, gated = _bytes(gate.chosen), _bytes(gate.gated)
    block = gate_block(inputs)
    grid = (blocks_of(tokens, block), heads, batch)
    places = (
        *query.stride()[:3], *inputs.key_cache.stride()[:3], inputs.table.stride(0), tokens,
        rules.scale,
    )  # fmt: skip
    common = {
        "GROUP": heads // inputs.key.shape[1],
        "HEAD_DIM": sizes["HEAD_DIM"],
        "BLOCK_D": sizes["BLOCK_D"],
        "BLOCK_S": block,
        "num_warps": 4,
        **launch_options(query.device),
    }
    if gate.key_sums is not None:
        over(sum_kernel, *grid)(
            query, inputs.key_cache, inputs.table, inputs.past, chosen, gated, gate.key_sums,
            gate.slots, block_sums, scores, *places, PAGE=sizes["PAGE"], **common,
        )  # fmt: skip
    else:
        over(share_kernel, *grid)(
            query, inputs.key_cache, _bytes(gate.chosen_cache), inputs.table, inputs.past,
            inputs.sinks, chosen, gated, scores, *places, PAGE=sizes["PAGE"],
            WINDOW=rules.window or 0, SOFTCAP=rules.softcap,
            TILE=_TILE if query.dtype != torch.float32 else 32, STAGES=2, **common,
        )  # fmt: skip
    over(gate_kernel, *grid)(
        output, inputs.past, chosen, gated, scores, gate.key_sums, gate.slots, block_sums, tokens,
        TOTAL=heads,
        BLOCK_H=power_of_2(heads),
        VALUE_DIM=sizes["VALUE_DIM"],
        BLOCK_V=sizes["BLOCK_V"],
        KEEP=gate.keep,
        FACTOR=gate.factor,
        **common,
    )  # fmt: skip


def _bytes(flags: Tensor | None) -> Tensor | None:
    """Flags as bytes, one after the other."""
    return None if flags is None else flags.contiguous().view(torch.uint8)
