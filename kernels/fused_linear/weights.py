"""What the Triton kernels of fused linear layers begin with: which weights, and asking early."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.launch import prefetch


@triton.jit
def weight_rows(block, features, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr):
    """The weight rows [BLOCK_N] of a block.

    With an activation, rows of gate and up alternate, so that a block has both of its outputs.
    Rows past the end repeat the last: their loads need no mask.
    """
    index = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if ACTIVATION is not None:  # pyright: ignore[reportUnnecessaryComparison]
        index = tl.minimum(index, features - 1)
        index = (index % 2) * (features // 2) + index // 2
    return tl.minimum(index, features - 1)


@triton.jit
def prefetch_weights(weight, weight_row, begin, inner, PREFETCH: tl.constexpr, PDL: tl.constexpr):
    """Bring PREFETCH input features from ``begin`` of some weight rows into L2."""
    LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
    if PREFETCH >= LINE:
        k = begin + tl.arange(0, PREFETCH // LINE) * LINE
        k = tl.minimum(k, inner - 1)
        prefetch(weight + weight_row.to(tl.int64)[:, None] * inner + k[None, :], PDL)
