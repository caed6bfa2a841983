"""Triton functions of ``linear_attention`` that turn gates into decays and write factors.

The device's logarithm is exact to about 2⁻²², absolutely. Near 1 that is too coarse here: a
half-life of 4096 tokens is a log decay of -1.7e-4 per token, and its error adds up over them. So
log(1 + x) and 1 - exp(-x) are series where they are small.
"""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

NO_FLOOR = tl.constexpr(1.0)


@triton.jit
def log_1_plus(x):
    """log(1 + x) for x in [0, 1]: the series of 2 artanh(x / (2 + x)), to float32's precision."""
    part = x / (2.0 + x)
    square = part * part
    series = 1 / 11 + square * (1 / 13)
    series = 1 / 7 + square * (1 / 9 + square * series)
    series = 1.0 + square * (1 / 3 + square * (1 / 5 + square * series))
    return 2.0 * part * series


@triton.jit
def log_decay(gate, TEMPERATURE: tl.constexpr, FLOOR: tl.constexpr):
    """Logarithm of the decay: logsigmoid(gate) / TEMPERATURE, not below FLOOR.

    Args:
        gate: float32, logits, or log decays where TEMPERATURE is 0.
        FLOOR: ``NO_FLOOR`` for none.
    """
    decay = gate
    if TEMPERATURE > 0:
        small = tl.exp(-tl.abs(gate))
        decay = (tl.minimum(gate, 0.0) - log_1_plus(small)) / TEMPERATURE
    if FLOOR <= 0:
        decay = tl.maximum(decay, FLOOR)
    return decay


@triton.jit
def loss(x):
    """1 - exp(-x) for x that is not negative, to float32's precision."""
    series = 1.0 - x * (1 / 5) * (1.0 - x * (1 / 6))
    series = 1.0 - x * (1 / 2) * (1.0 - x * (1 / 3) * (1.0 - x * (1 / 4) * series))
    return tl.where(x < 0.125, x * series, 1.0 - tl.exp(-x))


@triton.jit
def write_factor(decay):
    """√(1 - exp(2 · decay)) for log decays that are not positive."""
    return tl.sqrt(loss(-2.0 * decay))
