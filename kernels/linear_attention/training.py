"""``linear_attention`` on the GPU with a backward pass in Triton.

What acts on single tokens (gates, write factors, mixing, padding, norm) is PyTorch and
differentiated by it. What remains is a head with one state of W × Dv, W = N · Dk, and log decays.
"""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxgraft.kernels.launch import blocks_of, launch_options, over
from fxgraft.kernels.linear_attention import arguments
from fxgraft.kernels.linear_attention.arguments import Options
from fxgraft.kernels.linear_attention.gradient_kernel import (
    state_gradients_kernel,
    token_gradients_kernel,
    value_gradients_kernel,
)
from fxgraft.kernels.linear_attention.triton import Inputs, Plan, Rules


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    mixing: Tensor,
    norm_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    *,
    scale: float,
    temperature: float | None = None,
    floor: float | None = None,
    write_scale: str = "none",
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend; arguments and result are those of the op, and the log decays are bounded."""
    options = Options(scale, temperature, floor, write_scale)
    given = arguments.tokens(query, key, value, gate, mixing, key_mask, options)
    memory = arguments.initial_state(given, cu_seqlens, state)
    keys = given.key.expand(*given.log_decay.shape)
    parts = given.query.flatten(4).flatten(2, 3), keys.flatten(3), given.value
    products = torch.float32 if query.dtype == torch.float32 else torch.bfloat16
    result: Any = _Chunks.apply(
        *parts, given.log_decay.flatten(3), memory.flatten(2, 3), cu_seqlens, products
    )
    output, after = cast("tuple[Tensor, Tensor]", result)
    output = arguments.normalize(output, norm_weight, eps).to(query.dtype)
    return output, after.view(memory.shape).to(arguments.state_dtype(query, dtype))


class _Chunks(torch.autograd.Function):
    """Queries [B, S, Hq, W], keys and log decays [B, S, Hs, W], values [B, S, Hs, Dv] and states
    [rows, Hs, W, Dv] to outputs [B, S, Hq, Dv] and last states."""

    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> tuple[Tensor, Tensor]:
        *parts, cu_seqlens, products = tensors
        query, key, value, log_decay, before = (part.contiguous() for part in parts)
        inputs = Inputs(
            query, key, value, log_decay.unsqueeze(3), query.new_ones(query.shape[2], 1),
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        plan, after = Plan.of(inputs, products), torch.empty_like(before)
        rules = Rules(1.0)
        states = plan.states(inputs, before, after, rules)
        ctx.save_for_backward(query, key, value, log_decay, cu_seqlens, states, after)
        ctx.plan, ctx.inputs_rows = plan, inputs.rows
        return plan.outputs(inputs, rules, states, None), after

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        query, key, value, log_decay, cu_seqlens, states, after = ctx.saved_tensors
        output_gradient, after_gradient = grad_outputs
        if output_gradient is None:
            output_gradient = query.new_zeros(*query.shape[:3], value.shape[3])
        found = _backward(
            ctx, (query, key, value, log_decay), cu_seqlens, states,
            output_gradient.contiguous(),
            None if after_gradient is None else after_gradient.contiguous(),
        )  # fmt: skip
        query_gradient, key_gradient, value_gradient, before_gradient = found
        decay_gradient = _decay_gradient(
            (query, key), (query_gradient, key_gradient), cu_seqlens,
            None if after_gradient is None else (after * after_gradient).sum(-1),
        )  # fmt: skip
        return (
            query_gradient, key_gradient, value_gradient, decay_gradient, before_gradient,
            None, None,
        )  # fmt: skip


def _backward(
    ctx: Any,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    cu_seqlens: Tensor | None,
    states: Tensor,
    output_gradient: Tensor,
    after_gradient: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and first states."""
    query, key, value, log_decay = tensors
    plan: Plan = ctx.plan
    heads, width, value_dim = key.shape[2], key.shape[3], value.shape[3]
    rows: int = ctx.inputs_rows
    gradients = torch.empty_like(states)
    before_gradient = query.new_empty(rows, heads, width, value_dim)
    found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    tiles = blocks_of(width, plan.blocks["BLOCK_K"]), blocks_of(value_dim, plan.blocks["BLOCK_V"])
    chunk_rows = (query.shape[0] if plan.starts is None else 1) * heads
    packing = cu_seqlens, plan.starts
    lengths = query.shape[1], plan.count if plan.starts is None else rows
    options = {
        "HEADS": heads, "GROUP": query.shape[2] // heads, "WIDTH": width, "VALUE_DIM": value_dim,
        **plan.blocks, **launch_options(query.device),
    }  # fmt: skip
    over(state_gradients_kernel, rows * heads, *tiles)(
        query, log_decay, *packing, output_gradient, after_gradient, gradients, before_gradient,
        *lengths, **options,
    )  # fmt: skip
    over(token_gradients_kernel, plan.count, chunk_rows, tiles[0])(
        query, key, value, log_decay, *packing, output_gradient, states, gradients,
        *found[:2], *lengths, **options,
    )  # fmt: skip
    over(value_gradients_kernel, plan.count, chunk_rows, tiles[1])(
        query, key, log_decay, *packing, output_gradient, gradients, found[2],
        *lengths, **options,
    )  # fmt: skip
    return *found, before_gradient


def _decay_gradient(
    tensors: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    cu_seqlens: Tensor | None,
    from_states: Tensor | None,
) -> Tensor:
    """Gradient of the log decays [B, S, Hs, W] (DSLA specification, section 7.4).

    A log decay scales all that later tokens read of earlier writes: its gradient is the sum of
    q ⊙ dq - k ⊙ dk over its token and all later ones, and what the last states take from it.
    """
    query, key = (x * dx for x, dx in zip(tensors, gradients, strict=True))
    batch, length, heads, width = key.shape
    change = query.view(batch, length, heads, -1, width).sum(3) - key
    bounds = [0, length] if cu_seqlens is None else arguments.sequence_bounds(cu_seqlens)
    parts: list[Tensor] = []
    for number, (start, stop) in enumerate(pairwise(bounds)):
        part = change[:, start:stop].flip(1).cumsum(1).flip(1)
        if from_states is not None:
            states = from_states if cu_seqlens is None else from_states[number : number + 1]
            part = part + states.unsqueeze(1)
        parts.append(part)
    return torch.cat(parts, 1)
