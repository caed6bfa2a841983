"""Plain PyTorch form of ``linear_attention``: one step per token."""

from __future__ import annotations

import torch
from torch import Tensor

from fxgraft.kernels.linear_attention.arguments import (
    Options,
    Tokens,
    across_sequences,
    initial_state,
    normalize,
    state_dtype,
    tokens,
)


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
    """Attend; arguments and result are those of ``fxgraft.kernels.linear_attention.op``."""
    options = Options(scale, temperature, floor, write_scale)
    given = tokens(query, key, value, gate, mixing, key_mask, options)
    memory = initial_state(given, cu_seqlens, state)
    output, memory = across_sequences(recurrence, given, cu_seqlens, memory)
    output = normalize(output, norm_weight, eps).to(query.dtype)
    return output, memory.to(state_dtype(query, dtype))


def recurrence(given: Tokens, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token.

    Args:
        given: S tokens.
        memory: [B, Hs, N, Dk, Dv] before them.

    Returns:
        The output [B, S, Hq, Dv] and the memory after them.
    """
    loss = torch.expm1(given.log_decay)
    outputs: list[Tensor] = []
    for t in range(given.query.shape[1]):
        output, memory = step(
            given.query[:, t], given.key[:, t], given.value[:, t], loss[:, t], memory
        )
        outputs.append(output)
    return torch.stack(outputs, 1), memory


def step(
    query: Tensor, key: Tensor, value: Tensor, loss: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: the fields of ``Tokens`` without S, and the decay less 1 instead of its logarithm.

    Near 1, a decay is rounded the same way at every step, which adds up; what it lacks to 1 is
    exact. After 8192 tokens at a half-life of 4096 the output is so 30 times closer to float64.

    Returns:
        The output [B, Hq, Dv] and the memory [B, Hs, N, Dk, Dv].
    """
    written = key.unsqueeze(-1) * value[:, :, None, None, :]
    memory = memory + memory * loss.unsqueeze(-1) + written
    batch, heads, group, states, key_dim = query.shape
    wide = memory.reshape(batch, heads, states * key_dim, value.shape[-1])
    output = query.reshape(batch, heads, group, states * key_dim) @ wide
    return output.reshape(batch, heads * group, value.shape[-1]), memory
