"""Launches the Triton kernels of fused linear layers."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxgraft.kernels.fused_linear import config as configs
from fxgraft.kernels.fused_linear.config import Config
from fxgraft.kernels.fused_linear.matrix_kernel import matrix_kernel
from fxgraft.kernels.fused_linear.vector_kernel import vector_kernel
from fxgraft.kernels.launch import DTYPES, arrival_counters, blocks_of, launch_options, over


def config_for(x: Tensor, weight: Tensor) -> Config | None:
    """How to run x [..., K] and weight [N, K], or None where the library does."""
    if x.dtype not in DTYPES or not weight.is_contiguous() or x.numel() == 0:
        return None
    rows = x.numel() // x.shape[-1]
    if rows > configs.MOST_ROWS or weight.numel() == 0:
        return None
    config = configs.config_for(x.device, x.dtype, weight.shape[0], weight.shape[1], rows)
    return None if config.kernel == "library" else config


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    config: Config,
    eps: float | None = None,
    norm_offset: float = 0.0,
    activation: str | None = None,
) -> Tensor:
    """Run it; arguments and result are those of ``fxgraft.kernels.fused_linear.op``.

    One row is normalised as it is read. Tiles of several rows would be normalised again by every
    program, on their way to the tensor cores, which costs more than a kernel of its own.
    """
    features, inner = weight.shape
    rows = x.numel() // inner
    if eps is not None and config.kernel == "matrix":
        x = torch.ops.fxgraft.rms_norm(x, norm_weight, eps=eps, offset=norm_offset)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    width = features if activation is None else features // 2
    output = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    common: dict[str, Any] = {
        "ACTIVATION": activation,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "PREFETCH": config.prefetch,
        "num_warps": config.warps,
        **launch_options(weight.device),
    }
    blocks = blocks_of(features, config.block_n)
    if config.kernel == "vector":
        norm = (0.0 if eps is None else eps, norm_offset)
        over(vector_kernel, blocks)(
            x, weight, bias, norm_weight, residual, output, features, inner, *norm,
            NORM=eps is not None, **common,
        )  # fmt: skip
        return output
    block_r = max(16, configs.bucket_of(rows))
    partial = arrived = None
    if config.split_k > 1:
        size = blocks * config.split_k * block_r * config.block_n
        partial = torch.empty(size, dtype=torch.float32, device=weight.device)
        arrived = arrival_counters(weight.device, blocks)
    over(matrix_kernel, blocks, config.split_k)(
        x, weight, bias, residual, output, partial, arrived, rows, features, inner,
        EVEN=inner % config.block_k == 0,
        BLOCK_R=block_r,
        SPLIT_K=config.split_k,
        STAGES=config.stages,
        **common,
    )  # fmt: skip
    return output
