"""What the Triton kernels of paged attention share: addresses in blocks, rotation, scores."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.gated_activation.triton import tanh

LOG2_E = tl.constexpr(1.4426950408889634)
# Stands for -inf in running maxima: differences of two of them are 0, not NaN.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def entries(token, mask, table, page_stride, token_stride, PAGE: tl.constexpr):
    """Offsets (int64) of tokens in a cache, for a row's ``table``; 0 blocks where masked."""
    page = tl.load(table + token // PAGE, mask=mask, other=0)
    return page.to(tl.int64) * page_stride + (token % PAGE) * token_stride


@triton.jit
def unrotated(
    pointers, column, mask, cos, sin, angle, angle_mask,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The loads of ``rotated``: rows, the partners of their channels, cosines and sines."""
    value = tl.load(pointers + column, mask=mask, other=0.0)
    other, cosine, sine = value, value, value
    if ROTARY > 0:
        turns = column < ROTARY
        partner = _partner(column, ROTARY, INTERLEAVED)
        other = tl.load(pointers + partner, mask=mask & turns, other=0.0)
        cosine = tl.load(cos + angle + column, mask=angle_mask & turns, other=1.0)
        sine = tl.load(sin + angle + column, mask=angle_mask & turns, other=0.0)
    return value, other, cosine, sine


@triton.jit
def _partner(column, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The channel that each channel turns with."""
    if INTERLEAVED:
        partner = tl.where(column % 2 == 0, column + 1, column - 1)
    else:
        partner = tl.where(column < ROTARY // 2, column + ROTARY // 2, column - ROTARY // 2)
    return partner


@triton.jit
def turned(loaded, column, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """What ``unrotated`` loaded, with rotary position embedding."""
    value, other, cosine, sine = loaded
    if ROTARY > 0:
        is_first = _partner(column, ROTARY, INTERLEAVED) > column
        other = other.to(tl.float32)
        other = tl.where(is_first, -other, other) * sine.to(tl.float32)
        value = (value.to(tl.float32) * cosine.to(tl.float32) + other).to(value.dtype)
    return value


@triton.jit
def rotated(
    pointers, column, mask, cos, sin, angle, angle_mask,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows of queries or keys [R, C] with rotary position embedding, in their dtype.

    Args:
        pointers: [R, 1], where rows begin.
        column: [1, C].
        mask: [R, C].
        cos, sin: pointers, or None if nothing rotates.
        angle, angle_mask: offsets [R, 1] or [1, 1] of the rows of angles, and which to read.
        ROTARY: number of channels that rotate; 0 for none.
        INTERLEAVED: pairing of channels of ``fxgraft::rotary``.
    """
    loaded = unrotated(pointers, column, mask, cos, sin, angle, angle_mask, ROTARY, INTERLEAVED)
    return turned(loaded, column, ROTARY, INTERLEAVED)


@triton.jit
def scaled(score, scale, SOFTCAP: tl.constexpr):
    """Products of queries and keys as logits to the base 2."""
    score *= scale
    if SOFTCAP > 0:
        score = SOFTCAP * tanh(score / SOFTCAP)
    return score * LOG2_E
