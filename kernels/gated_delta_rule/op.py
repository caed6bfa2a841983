"""Definition of ``fxgraft::gated_delta_rule``."""

from __future__ import annotations

from typing import cast

import torch

from fxgraft.kernels.define import define
from fxgraft.kernels.gated_delta_rule.cost import flops
from fxgraft.kernels.gated_delta_rule.reference import (
    channel_gate,
    gated_delta_rule,
    initial_state,
    query_and_key,
    step,
)
from fxgraft.kernels.segments import segment_sums
from fxgraft.kernels.spec import OpSpec, State

CHUNK = 64
CHANNEL_GATE_CHUNK = 16  # a gate per channel needs [B, H, T, T, Dk] numbers at once


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    scale: float,
    l2norm: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, value_dim = value.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    memory = query.new_empty(batch, heads, key.shape[3], value_dim, dtype=dtype)
    return query.new_empty(value.shape), memory


def _implementation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    scale: float,
    l2norm: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    queries, keys = query_and_key(query, key, value.shape[2], scale, l2norm)
    memory = initial_state(key, value, state, dtype)
    values, log_decay, betas = (v.to(dtype) for v in (value, channel_gate(gate), beta))
    if query.shape[1] == 1:
        output, memory = step(
            queries[:, 0], keys[:, 0], values[:, 0], log_decay[:, 0].exp(), betas[:, 0], memory
        )
        return output.unsqueeze(1).to(query.dtype), memory
    # [B, S, H, ...] to [B, H, S, ...], one matrix product per head
    per_token = [v.transpose(1, 2) for v in (queries, keys, values, log_decay, betas.unsqueeze(-1))]
    size = CHUNK if gate.dim() == 3 else CHANNEL_GATE_CHUNK
    output = torch.empty_like(values, memory_format=torch.contiguous_format)
    for start in range(0, query.shape[1], size):
        t = slice(start, start + size)
        q, k, v, decay, b = (x[:, :, t] for x in per_token)
        chunk_output, memory = _chunk(q, k, v, decay, b, memory)
        output[:, t] = chunk_output.transpose(1, 2)
    return output.to(query.dtype), memory


def _chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    memory: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T tokens at once, each argument [B, H, T, ...].

    What each token writes depends on what the earlier ones wrote: a triangular system, solved for
    all T changes together (the UT transform of arXiv 2406.06484, section 3.2).
    """
    from_start = log_decay.cumsum(2).exp()  # decay since the chunk began
    between = segment_sums(log_decay).exp()  # [B, H, T, T, 1 or Dk]
    overlap = _decayed_products(key, key, between)
    change = _solve_below_diagonal(beta * overlap, beta * (value - (from_start * key) @ memory))
    output = (from_start * query) @ memory + _decayed_products(query, key, between) @ change
    kept = from_start[:, :, -1].unsqueeze(-1) * memory
    return output, kept + (between[:, :, -1] * key).transpose(2, 3) @ change


def _solve_below_diagonal(system: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Solve (I + ``system`` below its diagonal) X = ``wanted``; the rest of it is not read."""
    solution = torch.linalg.solve_triangular(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        system, wanted, upper=False, unitriangular=True
    )
    return cast(torch.Tensor, solution)


def _decayed_products(
    left: torch.Tensor, right: torch.Tensor, between: torch.Tensor
) -> torch.Tensor:
    """``left[t] · (decay from s to t) · right[s]`` for s up to t, else zero: [B, H, T, T]."""
    if between.shape[-1] == 1:
        return (left @ right.transpose(2, 3)) * between.squeeze(-1)
    return torch.einsum("bhtd,bhtsd,bhsd->bhts", left, between, right)


SPEC = define(
    OpSpec(
        name="gated_delta_rule",
        kind="mixer",
        reference=gated_delta_rule,
        flops=flops,
        states=(State("memory", "state", "fixed", output=1),),
    ),
    "(Tensor query, Tensor key, Tensor value, Tensor gate, Tensor beta, Tensor? state=None, *, "
    "float scale, bool l2norm=False) -> (Tensor, Tensor)",
    fake=_fake,
    implementation=_implementation,
)
