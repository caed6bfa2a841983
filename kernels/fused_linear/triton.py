"""Launches the Triton kernels of fused linear layers."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false

from __future__ import annotations

import torch
from torch import Tensor

from fxgraft.kernels.fused_linear import config as configs
from fxgraft.kernels.fused_linear.config import Config
from fxgraft.kernels.fused_linear.matrix_kernel import matrix_kernel
from fxgraft.kernels.fused_linear.vector_kernel import vector_kernel
from fxgraft.kernels.launch import DTYPES, arrival_counters, blocks_of, launch_options, over

# A product of float16 numbers before they are normalised could overflow.
_NORMALISES_LATER = {torch.bfloat16: 16, torch.float16: 1, torch.float32: 16}


def config_for(x: Tensor, weight: Tensor, *, normalises: bool) -> Config | None:
    """How to run x [..., K] and weight [N, K], or None where the library does.

    Args:
        x: rows of input.
        weight: weights.
        normalises: whether a norm comes first.
    """
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
    """Run one kernel; arguments and result are those of ``fxgraft.kernels.fused_linear.op``."""
    features, inner = weight.shape
    rows = x.numel() // inner
    if eps is not None and rows > _NORMALISES_LATER[x.dtype]:
        x = torch.ops.fxgraft.rms_norm(x, norm_weight, eps=eps, offset=norm_offset)
        eps = norm_weight = None
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    width = features if activation is None else features // 2
    output = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    tensors = (x, weight, bias, norm_weight, residual, output)
    numbers = (features, inner, 0.0 if eps is None else eps, norm_offset)
    if config.kernel == "vector":
        _launch_vector(tensors, numbers, config, eps is not None, activation)
    else:
        _launch_matrix(tensors, rows, numbers, config, eps is not None, activation)
    return output


def _launch_vector(
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int, int, float, float],
    config: Config,
    norm: bool,
    activation: str | None,
) -> None:
    weight = tensors[1]
    assert weight is not None
    over(vector_kernel, blocks_of(numbers[0], config.block_n))(
        *tensors,
        *numbers,
        NORM=norm,
        ACTIVATION=activation,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PREFETCH=config.prefetch,
        num_warps=config.warps,
        **launch_options(weight.device),
    )


def _launch_matrix(
    tensors: tuple[Tensor | None, ...],
    rows: int,
    numbers: tuple[int, int, float, float],
    config: Config,
    norm: bool,
    activation: str | None,
) -> None:
    weight = tensors[1]
    assert weight is not None
    features, inner, _, _ = numbers
    blocks, block_r = blocks_of(features, config.block_n), max(16, configs.bucket_of(rows))
    partial = arrived = None
    if config.split_k > 1:
        size = blocks * config.split_k * block_r * (config.block_n + 1)
        partial = torch.empty(size, dtype=torch.float32, device=weight.device)
        arrived = arrival_counters(weight.device, blocks)
    over(matrix_kernel, blocks, config.split_k)(
        *tensors,
        partial,
        arrived,
        rows,
        *numbers,
        NORM=norm,
        ACTIVATION=activation,
        EVEN=inner % config.block_k == 0,
        BLOCK_R=block_r,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT_K=config.split_k,
        STAGES=config.stages,
        PREFETCH=config.prefetch,
        num_warps=config.warps,
        **launch_options(weight.device),
    )
