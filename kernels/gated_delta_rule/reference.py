"""Plain PyTorch form of ``gated_delta_rule``: one step per token."""

from __future__ import annotations

import torch

NORM_EPSILON = 1e-6


def gated_delta_rule(
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
    """Run the gated delta rule (arXiv 2412.06464, equation 10).

    ``S' = exp(gate[t]) S[t-1]``, ``S[t] = S' + beta[t] k[t] (v[t] - S'ᵀ k[t])ᵀ``,
    ``output[t] = scale S[t]ᵀ q[t]``.

    Args:
        query: [B, S, K, Dk]; each of the K heads serves H / K consecutive value heads.
        key: [B, S, K, Dk].
        value: [B, S, H, Dv].
        gate: logarithm of the decay, not positive: [B, S, H], or [B, S, H, Dk] for a decay per
            key channel (Kimi delta attention, arXiv 2510.26692).
        beta: how much of the old answer to replace, [B, S, H].
        state: [B, H, Dk, Dv]; zeros if not given.
        scale: factor of the query.
        l2norm: normalise query and key to length 1 first.

    Returns:
        The output [B, S, H, Dv] of ``query``'s dtype and the state after the last token
        [B, H, Dk, Dv], which is float32, or float64 for float64 inputs, like the arithmetic
        inside.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    queries, keys = query_and_key(query, key, value.shape[2], scale, l2norm)
    memory = initial_state(key, value, state, dtype)
    decay = channel_gate(gate).to(dtype).exp()
    values, betas = value.to(dtype), beta.to(dtype)
    outputs: list[torch.Tensor] = []
    for t in range(query.shape[1]):
        output, memory = step(
            queries[:, t], keys[:, t], values[:, t], decay[:, t], betas[:, t], memory
        )
        outputs.append(output)
    return torch.stack(outputs, 1).to(query.dtype), memory


def step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    memory: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: the arguments of the op without S, ``decay`` [B, H, Dk or 1]."""
    memory = memory * decay.unsqueeze(-1)
    answer = (key.unsqueeze(-2) @ memory).squeeze(-2)
    change = beta.unsqueeze(-1) * (value - answer)
    memory = memory + key.unsqueeze(-1) * change.unsqueeze(-2)
    return (query.unsqueeze(-2) @ memory).squeeze(-2), memory


def query_and_key(
    query: torch.Tensor, key: torch.Tensor, heads: int, scale: float, l2norm: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key [B, S, H, Dk] as they enter the recurrence, in the arithmetic's dtype."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(dtype), key.to(dtype)
    if l2norm:
        query, key = _normalize(query), _normalize(key)
    if key.shape[2] != heads:
        repeats = heads // key.shape[2]
        query, key = query.repeat_interleave(repeats, 2), key.repeat_interleave(repeats, 2)
    return query * scale, key


def channel_gate(gate: torch.Tensor) -> torch.Tensor:
    """A gate [B, S, H] or [B, S, H, Dk] as [B, S, H, 1 or Dk]."""
    return gate.unsqueeze(-1) if gate.dim() == 3 else gate


def initial_state(
    key: torch.Tensor, value: torch.Tensor, state: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The given state, or zeros [B, H, Dk, Dv]."""
    if state is None:
        return value.new_zeros(
            value.shape[0], value.shape[2], key.shape[3], value.shape[3], dtype=dtype
        )
    return state.to(dtype)


def _normalize(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPSILON)
