"""Plain PyTorch form of ``wkv``: one step per token."""

from __future__ import annotations

import math

import torch


def wkv(
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    bonus: torch.Tensor,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the values so far, weighted by fading keys (arXiv 2305.13048, equation 16).

    ``output[t] = (Σ_{s<t} e^{(t-1-s) decay + k[s]} v[s] + e^{bonus + k[t]} v[t]) / (the same
    without v)``, per channel.

    Args:
        key: [B, S, C].
        value: [B, S, C].
        decay: logarithm of the decay per token, not positive, [C].
        bonus: added to the key of the present token, [C].
        state: numerator, denominator and the logarithm of their common scale, [B, C, 3]; zeros
            if not given. A denominator of zero means that there is no past.

    Returns:
        The output [B, S, C] of ``key``'s dtype and the state after the last token [B, C, 3],
        which is float32, or float64 for float64 inputs, like the arithmetic inside.
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    numerator, denominator, exponent = unpack(key, state, dtype)
    keys, values, decay, bonus = (v.to(dtype) for v in (key, value, decay, bonus))
    outputs: list[torch.Tensor] = []
    for t in range(key.shape[1]):
        k, v = keys[:, t], values[:, t]
        past, present = _weights(exponent, k + bonus)
        outputs.append((past * numerator + present * v) / (past * denominator + present))
        past, present = _weights(exponent + decay, k)
        numerator = past * numerator + present * v
        denominator = past * denominator + present
        exponent = torch.maximum(exponent + decay, k)
    return torch.stack(outputs, 1).to(key.dtype), torch.stack(
        [numerator, denominator, exponent], -1
    )


def unpack(
    key: torch.Tensor, state: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Numerator, denominator and exponent, [B, C] each; exponent -inf where there is no past."""
    if state is None:
        state = key.new_zeros(key.shape[0], key.shape[2], 3, dtype=dtype)
    numerator, denominator, exponent = state.to(dtype).unbind(-1)
    return numerator, denominator, exponent.masked_fill(denominator == 0, -math.inf)


def _weights(past: torch.Tensor, present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``exp`` of both, divided by the larger: no overflow."""
    largest = torch.maximum(past, present)
    return torch.exp(past - largest), torch.exp(present - largest)
