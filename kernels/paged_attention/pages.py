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
def rotated(
    pointers,
    column,
    mask,
    cos,
    sin,
    angle,
    angle_mask,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
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
    value = tl.load(pointers + column, mask=mask, other=0.0)
    if ROTARY > 0:
        if INTERLEAVED:
            is_first = column % 2 == 0
            partner = tl.where(is_first, column + 1, column - 1)
        else:
            is_first = column < ROTARY // 2
            partner = tl.where(is_first, column + ROTARY // 2, column - ROTARY // 2)
        turns = column < ROTARY
        other = tl.load(pointers + partner, mask=mask & turns, other=0.0).to(tl.float32)
        cosine = tl.load(cos + angle + column, mask=angle_mask & turns, other=1.0).to(tl.float32)
        sine = tl.load(sin + angle + column, mask=angle_mask & turns, other=0.0).to(tl.float32)
        turned = value.to(tl.float32) * cosine + tl.where(is_first, -other, other) * sine
        value = turned.to(value.dtype)
    return value


@triton.jit
def scaled(score, scale, SOFTCAP: tl.constexpr):
    """Products of queries and keys as logits to the base 2."""
    score *= scale
    if SOFTCAP > 0:
        score = SOFTCAP * tanh(score / SOFTCAP)
    return score * LOG2_E
