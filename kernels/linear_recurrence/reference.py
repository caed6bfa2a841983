"""Plain PyTorch form of ``linear_recurrence``: one step per token."""

from __future__ import annotations

import torch


def linear_recurrence(
    x: torch.Tensor, decay: torch.Tensor, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ``h[t] = decay[t] h[t-1] + x[t]`` (arXiv 2402.19427, equation 4, inputs gated before).

    Args:
        x: [B, S, D].
        decay: [B, S, D].
        state: h before the first token, [B, D]; zeros if not given.

    Returns:
        h for all tokens [B, S, D] of ``x``'s dtype and h after the last token [B, D], which is
        float32, or float64 for float64 inputs, like the arithmetic inside.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    hidden = x.new_zeros(x.shape[0], x.shape[2], dtype=dtype) if state is None else state.to(dtype)
    inputs, decays = x.to(dtype), decay.to(dtype)
    outputs: list[torch.Tensor] = []
    for t in range(x.shape[1]):
        hidden = decays[:, t] * hidden + inputs[:, t]
        outputs.append(hidden)
    return torch.stack(outputs, 1).to(x.dtype), hidden
