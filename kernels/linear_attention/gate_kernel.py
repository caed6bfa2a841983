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
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def log_1_plus(x):
    """log(1 + x) for x in [0, 1], to 1.5e-6 of its value."""
    series = 1 / 6 - x * (1 / 7 - x * (1 / 8))
    series = 1 / 4 - x * (1 / 5 - x * series)
    series = x * (1.0 - x * (1 / 2 - x * (1 / 3 - x * series)))
    return tl.where(x < 0.125, series, tl.log(1.0 + x))


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
        decay = (tl.minimum(gate, 0.0) - log_1_plus(small)) * (1 / TEMPERATURE)
    if FLOOR <= 0:
        decay = tl.maximum(decay, FLOOR)
    return decay


@triton.jit
def log2_decay(gate, TEMPERATURE: tl.constexpr, FLOOR: tl.constexpr, FAST: tl.constexpr):
    """Logarithm to base 2 of the decay; arguments as in ``log_decay``.

    Args:
        FAST: whether 1e-5 of it may be wrong, which suits 16-bit products.
    """
    if not FAST:
        decay = log_decay(gate, TEMPERATURE, FLOOR) * LOG2_E
    else:
        decay = gate * LOG2_E
        if TEMPERATURE > 0:
            unit = LOG2_E / TEMPERATURE
            x = tl.exp2(tl.abs(gate) * -LOG2_E)
            # log(1 + x) / x to 1e-5, from its values at Chebyshev's points of [0, 1].
            series = 0.20907954 * unit - x * (0.10013973 * unit - x * (0.02344366 * unit))
            series = 0.49931465 * unit - x * (0.32484958 * unit - x * series)
            decay = tl.minimum(gate, 0.0) * unit - x * (0.99999059 * unit - x * series)
        if FLOOR <= 0:
            decay = tl.maximum(decay, FLOOR * LOG2_E)
    return decay


@triton.jit
def loss(x):
    """1 - exp(-x) for x that is not negative, to float32's precision."""
    series = 1 / 6 - x * (1 / 24 - x * (1 / 120 - x * (1 / 720)))
    series = x * (1.0 - x * (1 / 2 - x * series))
    return tl.where(x < 0.125, series, 1.0 - tl.exp(-x))


@triton.jit
def write_factor(decay):
    """√(1 - exp(2 · decay)) for log decays that are not positive."""
    return tl.sqrt(loss(-2.0 * decay))


@triton.jit
def once(x):
    """x [W], each computed by one thread.

    As a factor of the rows of a matrix, all threads of a row would compute it: Triton moves
    elementwise operations behind a change of layout, but not a sum, be it over one element.
    """
    return tl.sum(tl.reshape(x, (x.shape[0], 1)), axis=1)
