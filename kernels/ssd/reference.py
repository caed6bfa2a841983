"""Plain PyTorch form of ``ssd``: one step per token."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the state-space recurrence of Mamba-2 (arXiv 2405.21060, section 6).

    ``h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]ᵀ``, ``y[t] = (h[t] C[t] + D x[t]) silu(z[t])``.

    Args:
        x: [B, S, H, P].
        dt: time steps, [B, S, H].
        A: [H], negative.
        B: [B, S, G, N]; each of the G groups serves H / G consecutive heads.
        C: [B, S, G, N].
        D: skip weight, [H] or [H, P].
        dt_bias: added to ``dt`` first, [H].
        z: gate, [B, S, H, P].
        state: [B, H, P, N]; zeros if not given.
        softplus: pass ``dt`` (with its bias) through softplus.
        dt_min: lower bound of the time step, after softplus.
        dt_max: upper bound of the time step, after softplus; none if not given.

    Returns:
        The output [B, S, H, P] of ``x``'s dtype and the state after the last token
        [B, H, P, N], which is float32, or float64 for float64 inputs, like the arithmetic inside.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps = time_steps(dt, dt_bias, softplus, dt_min, dt_max, dtype)
    hidden = initial_state(x, B, state, dtype)
    heads = x.shape[2]
    Bs, Cs = expand_groups(B.to(dtype), heads), expand_groups(C.to(dtype), heads)
    outputs: list[torch.Tensor] = []
    for t in range(x.shape[1]):
        output, hidden = step(
            x[:, t].to(dtype), steps[:, t], A.to(dtype), Bs[:, t], Cs[:, t], hidden
        )
        outputs.append(output)
    return skip_and_gate(torch.stack(outputs, 1), x, D, z), hidden


def step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    hidden: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: ``x`` [B, H, P], ``dt`` [B, H], ``B`` and ``C`` [B, H, N]; output and state."""
    decay = torch.exp(dt * A)[..., None, None]
    hidden = decay * hidden + (dt[..., None] * x)[..., None] * B[..., None, :]
    return (hidden @ C[..., None]).squeeze(-1), hidden


def time_steps(
    dt: torch.Tensor,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    dt_min: float,
    dt_max: float | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``dt`` [B, S, H] with its bias, softplus and bounds applied."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if softplus:
        dt = F.softplus(dt)
    return dt.clamp(dt_min, dt_max)


def initial_state(
    x: torch.Tensor, B: torch.Tensor, state: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The given state, or zeros [B, H, P, N]."""
    if state is None:
        return x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=dtype)
    return state.to(dtype)


def expand_groups(value: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, S, G, N] to [B, S, H, N], each group repeated for its heads."""
    groups = value.shape[2]
    return value if groups == heads else value.repeat_interleave(heads // groups, 2)


def skip_and_gate(
    output: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None
) -> torch.Tensor:
    """Add the skip connection to ``output`` [B, S, H, P], gate it, and give it ``x``'s dtype."""
    if D is not None:
        skip = D[:, None] if D.dim() == 1 else D
        output = output + skip.to(output.dtype) * x.to(output.dtype)
    if z is not None:
        output = output * F.silu(z.to(output.dtype))
    return output.to(x.dtype)
