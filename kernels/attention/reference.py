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
    scores, visible = scores_of(
        query,
        key,
        key_mask,
        bias,
        scale=scale,
        is_causal=is_causal,
        window=window,
        chunk=chunk,
        softcap=softcap,
    )
    weights = softmax_of(scores, visible, sinks)
    return _grouped_matmul(weights, value.to(weights.dtype)).to(query.dtype)


def scores_of(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    *,
    scale: float,
    is_causal: bool,
    window: int | None,
    chunk: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor | None]:
    """Logits [B, Hq, S, T] with cap and bias, and which keys are visible (None: all)."""
    compute = torch.promote_types(query.dtype, torch.float32)
    scores = _grouped_matmul(query.to(compute), key.to(compute).transpose(-1, -2)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    visible = visible_keys(
        query.shape[2],
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
    return scores, visible


def softmax_of(scores: Tensor, visible: Tensor | None, sinks: Tensor | None) -> Tensor:
    """Weights [B, H, S, T] of logits; rows that see no key, and their gradients, are 0.

    Args:
        scores: [B, H, S, T].
        visible: bool, broadcastable to the scores, or None.
        sinks: [H].
    """
    if sinks is not None:
        batch, heads, length, _ = scores.shape
        sinks = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(batch, heads, length, 1)
    return _masked_softmax(scores, visible, sinks)


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
