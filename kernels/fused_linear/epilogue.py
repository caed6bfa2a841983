"""What the Triton kernels of fused linear layers end with."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.fused_linear.weights import weight_rows
from fxgraft.kernels.gated_activation.triton import activate


@triton.jit
def finish(
    product,
    bias,
    residual,
    output,
    block,
    row,
    rows,
    features,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Bias, gate and residual of float32 products [R, BLOCK_N], and the store.

    Args:
        product: sums over all input features, its columns those of ``weight_rows``.
        bias: [N] or None.
        residual: rows of the output's width, or None.
        output: rows of the output's width, N or N / 2.
        block: which block of weight rows.
        row: [R], where the products' rows lie in residual and output.
        rows: number of rows; others are not stored.
        features: N.
        ACTIVATION: name or None.
        BLOCK_N: weight rows of a block.
    """
    width = features
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if bias is not None:
        weight_row = weight_rows(block, features, ACTIVATION, BLOCK_N)
        product += tl.load(bias + weight_row).to(tl.float32)[None, :]
    if ACTIVATION is not None:  # pyright: ignore[reportUnnecessaryComparison]
        width = features // 2
        column = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        gate, up = tl.split(tl.reshape(product, (product.shape[0], BLOCK_N // 2, 2)))
        product = activate(gate, ACTIVATION) * up
    mask = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    if residual is not None:
        product += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + place, product.to(output.dtype.element_ty), mask=mask)
