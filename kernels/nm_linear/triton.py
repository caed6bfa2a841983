"""Launches the Triton kernels of N:M sparse linear layers."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fxgraft.kernels.launch import (
    DTYPES,
    arrival_counters,
    blocks_of,
    launch_options,
    over,
    power_of_2,
)
from fxgraft.kernels.nm_linear import config as configs
from fxgraft.kernels.nm_linear.arguments import ONLY_PRODUCT, Parts
from fxgraft.kernels.nm_linear.config import Config
from fxgraft.kernels.nm_linear.config import has_tiles as has_tiles
from fxgraft.kernels.nm_linear.layout import Layout
from fxgraft.kernels.nm_linear.matrix_kernel import matrix_kernel
from fxgraft.kernels.nm_linear.mma_kernel import mma_kernel
from fxgraft.kernels.nm_linear.tile import unpack_kernel
from fxgraft.kernels.nm_linear.vector_kernel import vector_kernel

_ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def config_for(x: Tensor, values: Tensor, indices: Tensor, layout: Layout) -> Config | None:
    """How to run x [..., K] on a packed weight, or None where no kernel takes it."""
    packed = values.is_contiguous() and indices.is_contiguous()
    if x.dtype not in DTYPES or not packed or x.numel() == 0 or values.numel() == 0:
        return None
    rows = x.numel() // x.shape[-1]
    return configs.config_for(x.device, x.dtype, values.shape[2], layout, rows)


def takes_norm(x: Tensor, config: Config) -> bool:
    """Whether the kernel normalises x [..., K] as it reads it: one row, as in ``fused_linear``.

    ``"mma"`` multiplies by the norm's weight in x's type, whose range float16 could leave.
    """
    if config.kernel == "mma" and (config.split_k > 1 or x.dtype != torch.bfloat16):
        return False
    return config.kernel in ("mma", "vector") and x.numel() == x.shape[-1]


def nm_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    parts: Parts = ONLY_PRODUCT,
    *,
    layout: Layout,
    config: Config,
) -> Tensor:
    """Run the kernel ``"mma"``, ``"vector"`` or ``"matrix"`` of a configuration on one weight.

    Arguments and result are those of ``fxgraft.kernels.nm_linear.op``; ``parts`` asks for no
    experts, and for a norm only where ``takes_norm``.
    """
    activation = parts.activation
    features, rows = values.shape[2], x.numel() // x.shape[-1]
    x = x.contiguous()
    residual = None if parts.residual is None else parts.residual.contiguous()
    output = torch.empty(parts.output_shape(x, values), dtype=x.dtype, device=x.device)
    block_r = {"mma": 8, "vector": power_of_2(rows)}.get(config.kernel, config.block_r)
    blocks, row_blocks = blocks_of(features, config.block_n), blocks_of(rows, block_r)
    partial = arrived = None
    if config.split_k > 1:
        size = blocks * row_blocks * config.split_k * block_r * config.block_n
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
        arrived = arrival_counters(x.device, blocks * row_blocks)
    common: dict[str, Any] = {
        "ACTIVATION": activation,
        "BLOCK_N": config.block_n,
        "SPLIT_K": config.split_k,
        "num_warps": config.warps,
        **launch_options(x.device),
    }
    tensors = (indices, parts.bias, residual, output, partial, arrived)
    norm = (parts.norm_weight, parts.eps or 0.0, parts.norm_offset)
    if config.kernel == "mma":
        gain = None if parts.norm_weight is None else _aligned(parts.norm_weight)
        over(mma_kernel, blocks, config.split_k)(
            _aligned(x), _aligned(values), *tensors, rows, features, layout.chunks,
            gain, *norm[1:],
            NORM=parts.eps is not None,
            N=layout.n,
            M=layout.m,
            WORDS=layout.words,
            CODE_BITS=layout.code_bits,
            IS_MASK=layout.is_mask,
            ELEMENT=_ELEMENTS[x.dtype],
            WARPS=config.warps,
            AHEAD=config.prefetch,
            ASSEMBLY=x.is_cuda,
            **common,
        )  # fmt: skip
        return output
    common |= {**_constants(layout), "BLOCK_R": block_r, "BLOCK_C": config.block_c}
    if config.kernel == "vector":
        over(vector_kernel, blocks, config.split_k)(
            x, values, *tensors, features, layout.chunks, *norm,
            NORM=parts.eps is not None,
            INNER=layout.columns,
            ROWS=rows,
            EVEN=layout.chunks % (config.block_c * config.split_k) == 0,
            PREFETCH=config.prefetch,
            ASSEMBLY=x.is_cuda,
            **common,
        )  # fmt: skip
        return output
    over(matrix_kernel, blocks, config.split_k, row_blocks)(
        x, _pairs(values), *tensors, rows, features, layout.chunks, **common
    )
    return output


def unpack(values: Tensor, indices: Tensor, layout: Layout) -> Tensor:
    """The dense weight [rows, K] of a packed one of 16-bit values with tiles."""
    features = values.shape[2]
    dense = torch.empty(features, layout.columns, dtype=values.dtype, device=values.device)
    block_n, block_c = 32, 4
    over(unpack_kernel, blocks_of(features, block_n), blocks_of(layout.chunks, block_c))(
        _pairs(values), indices, dense.view(torch.uint16), features, layout.chunks,
        **_constants(layout),
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=4,
    )  # fmt: skip
    return dense


def _aligned(tensor: Tensor) -> Tensor:
    """``_pairs`` of a contiguous tensor that begins at a multiple of 16 bytes, or of its copy."""
    return _pairs(tensor if tensor.data_ptr() % 16 == 0 else tensor.clone())


def _pairs(values: Tensor) -> Tensor:
    """The same memory as int32; a dimension of size 1 may have any stride, so there is only one."""
    return values.reshape(-1).view(torch.int32)


def _constants(layout: Layout) -> dict[str, Any]:
    """What kernels know of a layout while they are compiled."""
    return {
        "N": layout.n,
        "M": layout.m,
        "LANE": layout.lane,
        "WORDS": layout.words,
        "CODE_BITS": layout.code_bits,
        "POSITION_BITS": layout.position_bits,
        "IS_MASK": layout.is_mask,
    }
