"""The Triton kernel of a fused linear layer for one row: multiply and add, no tensor cores."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.fused_linear.epilogue import finish
from fxgraft.kernels.fused_linear.weights import prefetch_weights, weight_rows
from fxgraft.kernels.launch import wait_for_inputs


@triton.jit
def vector_kernel(
    x,
    weight,
    bias,
    norm_weight,
    residual,
    output,
    features,
    inner,
    eps,
    offset,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N of the N = ``features`` weight rows times x [K = ``inner``].

    The weights of the next iteration are loaded before those of this one are used, the first ones
    before x exists.
    """
    row = weight_rows(tl.program_id(0), features, ACTIVATION, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    pointers = weight + row.to(tl.int64)[:, None] * inner + k[None, :]
    tile = tl.load(pointers, mask=(k < inner)[None, :], other=0.0, eviction_policy="evict_first")
    prefetch_weights(weight, row, BLOCK_K, inner, PREFETCH, PDL)
    wait_for_inputs(PDL)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, inner, BLOCK_K):
        here = start + k
        following = tl.load(
            pointers + start + BLOCK_K,
            mask=(here + BLOCK_K < inner)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        value = tl.load(x + here, mask=here < inner, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            if norm_weight is not None:
                gain = tl.load(norm_weight + here, mask=here < inner, other=0.0).to(tl.float32)
                value *= gain + offset
        total += tile.to(tl.float32) * value[None, :]
        tile = following
    product = tl.sum(total, axis=1)
    if NORM:
        product *= tl.rsqrt(tl.sum(squares, axis=0) / inner + eps)
    finish(
        product[None, :],
        bias,
        residual,
        output,
        tl.program_id(0),
        tl.zeros((1,), tl.int32),
        1,
        features,
        ACTIVATION,
        BLOCK_N,
    )
