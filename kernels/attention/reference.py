"""Attention in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fxgraft.kernels.attention.mask import visible_keys


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attend, with every tensor of scores in at least float32.

    Arguments and result are those of ``fxgraft.kernels.attention.op``, which also checks them.
    """
    compute = torch.promote_types(query.dtype, torch.float32)
    batch, heads, length, _ = query.shape
    scores = _grouped_matmul(query.to(compute), key.to(compute).transpose(-1, -2)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    visible = visible_keys(
        length,
        key.shape[2],
        key_mask,
        device=query.device,
        is_causal=is_causal,
        window=window,
        chunk=chunk,
    )
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(compute)
        scores = scores + bias
        bias = bias > -torch.inf
    if bias is not None:
        visible = bias if visible is None else visible & bias
    if sinks is not None:
        sinks = sinks.to(compute).view(1, -1, 1, 1).expand(batch, heads, length, 1)
    weights = _masked_softmax(scores, visible, sinks)
    return _grouped_matmul(weights, value.to(compute)).to(query.dtype)


def _grouped_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiply [B, Hq, M, K] by [B, Hkv, K, N]: Hq / Hkv consecutive left heads share one right."""
    batch, heads, rows, inner = left.shape
    kv_heads, columns = right.shape[1], right.shape[3]
    groups = heads // kv_heads
    # Without the flatten, reshape's strides put a guard on a symbolic length at export.
    grouped = left.reshape(batch, kv_heads, groups, rows, inner).flatten(2, 3)
    return (grouped @ right).reshape(batch, kv_heads, groups, rows, columns).flatten(1, 2)


def _masked_softmax(scores: Tensor, visible: Tensor | None, sinks: Tensor | None) -> Tensor:
    """Softmax over visible keys [B, H, S, T]; rows that see none, and their gradients, are 0."""
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is None:
        weights = torch.softmax(scores, -1)
    else:
        weights = torch.softmax(torch.cat((scores, sinks), -1), -1)[..., :-1]
    # A row of nothing but -inf is NaN here; its gradient is stopped by the fill above.
    return weights if visible is None else weights.masked_fill(~visible, 0.0)
