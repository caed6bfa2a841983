"""Plain PyTorch form of ``selective_scan``: one step per token."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    softplus: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the state-space recurrence of Mamba-1 (arXiv 2312.00752, Algorithm 2).

    ``h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]``, ``y[t] = (C[t] · h[t] + D x[t]) silu(z[t])``.

    Args:
        x: [B, D, S].
        dt: time steps, [B, D, S].
        A: [D, N], negative.
        B: [B, N, S].
        C: [B, N, S].
        D: skip weight, [D].
        z: gate, [B, D, S].
        dt_bias: added to ``dt`` first, [D].
        state: [B, D, N]; zeros if not given.
        softplus: pass ``dt`` (with its bias) through softplus.

    Returns:
        The output [B, D, S] of ``x``'s dtype and the state after the last token [B, D, N], which
        is float32, or float64 for float64 inputs, like the arithmetic inside.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps = time_steps(dt, dt_bias, softplus, dtype)
    hidden = initial_state(x, A, state, dtype)
    inputs = steps * x.to(dtype)
    outputs: list[torch.Tensor] = []
    for t in range(x.shape[2]):
        decay = torch.exp(steps[:, :, t, None] * A.to(dtype))
        hidden = decay * hidden + inputs[:, :, t, None] * B[:, None, :, t].to(dtype)
        outputs.append((hidden * C[:, None, :, t].to(dtype)).sum(-1))
    return skip_and_gate(torch.stack(outputs, -1), x, D, z), hidden


def time_steps(
    dt: torch.Tensor, dt_bias: torch.Tensor | None, softplus: bool, dtype: torch.dtype
) -> torch.Tensor:
    """``dt`` [B, D, S] with its bias and softplus applied."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias[:, None].to(dtype)
    return F.softplus(dt) if softplus else dt


def initial_state(
    x: torch.Tensor, A: torch.Tensor, state: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The given state, or zeros [B, D, N]."""
    if state is None:
        return x.new_zeros(x.shape[0], *A.shape, dtype=dtype)
    return state.to(dtype)


def skip_and_gate(
    output: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None
) -> torch.Tensor:
    """Add the skip connection to ``output`` [B, D, S], gate it, and give it ``x``'s dtype."""
    if D is not None:
        output = output + D[:, None].to(output.dtype) * x.to(output.dtype)
    if z is not None:
        output = output * F.silu(z.to(output.dtype))
    return output.to(x.dtype)
