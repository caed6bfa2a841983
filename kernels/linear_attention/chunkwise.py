"""Chunkwise form of ``linear_attention`` in plain PyTorch: exact, differentiable.

A head with N states of key width Dk is a head with one state of key width W = N · Dk, so that
all states share each product. Inside a chunk, the decay between two tokens is the exponential of
a difference of running sums of log decays. It is a product of two factors, one per token, only
where neither can overflow: with a floor, see ``_bounded_scores``. Otherwise the exponent is
formed for each pair of tokens, in chunks that are shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxgraft.kernels.linear_attention.arguments import (
    Options,
    Tokens,
    across_sequences,
    initial_state,
    normalize,
    state_dtype,
    tokens,
)
from fxgraft.kernels.linear_attention.reference import recurrence
from fxgraft.kernels.segments import segment_sums

CHUNK = 64
PAIRWISE_CHUNK = 16  # every pair of tokens has W exponents
LARGEST_SUM = 64.0
"""Of a chunk's log decays, for products of factors: beside e^64 = 6e27 float32 has room for 5e10.

Factors counted from the middle of the chunk would be smaller, but depend on later tokens.
"""


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    mixing: Tensor,
    norm_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    *,
    scale: float,
    temperature: float | None = None,
    floor: float | None = None,
    write_scale: str = "none",
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Attend; arguments and result are those of ``fxgraft.kernels.linear_attention.op``.

    Args:
        chunk: most tokens per chunk; the result does not depend on it.
    """
    options = Options(scale, temperature, floor, write_scale)
    given = tokens(query, key, value, gate, mixing, key_mask, options)
    memory = initial_state(given, cu_seqlens, state)
    bounded = floor is not None and -floor * chunk <= LARGEST_SUM
    size = chunk if bounded else min(chunk, PAIRWISE_CHUNK)

    def form(part: Tokens, before: Tensor) -> tuple[Tensor, Tensor]:
        if part.query.shape[1] == 1:
            return recurrence(part, before)
        return _chunks(part, before, size, bounded)

    output, memory = across_sequences(form, given, cu_seqlens, memory)
    output = normalize(output, norm_weight, eps).to(query.dtype)
    return output, memory.to(state_dtype(query, dtype))


def _chunks(given: Tokens, memory: Tensor, size: int, bounded: bool) -> tuple[Tensor, Tensor]:
    """All tokens, ``size`` at a time; arguments and result are those of a ``Form``."""
    batch, length, heads, group, states, key_dim = given.query.shape
    value_dim = given.value.shape[-1]
    width = states * key_dim
    query = given.query.permute(0, 2, 3, 1, 4, 5).reshape(batch, heads, group, length, width)
    key = given.key.expand(*given.log_decay.shape)
    key, decay = (x.flatten(3).transpose(1, 2) for x in (key, given.log_decay))
    value = given.value.transpose(1, 2)
    wide = memory.reshape(batch, heads, width, value_dim)
    outputs: list[Tensor] = []
    for start in range(0, length, size):
        t = slice(start, start + size)
        q, k, v, d = query[:, :, :, t], key[:, :, t], value[:, :, t], decay[:, :, t]
        output, wide = _chunk(q, k, v, d, wide, bounded)
        outputs.append(output)
    output = torch.cat(outputs, 3).permute(0, 3, 1, 2, 4)
    output = output.reshape(batch, length, heads * group, value_dim).contiguous()
    return output, wide.view(memory.shape)


def _chunk(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, memory: Tensor, bounded: bool
) -> tuple[Tensor, Tensor]:
    """T tokens at once: attention inside the chunk, the memory for all before it.

    Args:
        query: [B, H, G, T, W].
        key: [B, H, T, W].
        value: [B, H, T, Dv].
        log_decay: [B, H, T, W].
        memory: [B, H, W, Dv].
        bounded: whether the inverse of the decay since the chunk began cannot overflow.
    """
    sums = log_decay.cumsum(2)
    decayed = (query * sums.exp().unsqueeze(2)).flatten(2, 3)
    if bounded:
        scores = _bounded_scores(decayed, key * (-sums).exp())
    else:
        scores = _pairwise_scores(query, key, log_decay)
    output = scores @ value + decayed @ memory
    written = (key * _to_last(log_decay).exp()).transpose(2, 3) @ value
    memory = sums[:, :, -1:].exp().transpose(2, 3) * memory + written
    return output.reshape(*query.shape[:4], value.shape[-1]), memory


def _to_last(log_decay: Tensor) -> Tensor:
    """Sum of the log decays behind each token, added up so that no digits cancel."""
    behind = log_decay.flip(2).cumsum(2).flip(2)
    return torch.cat([behind[:, :, 1:], torch.zeros_like(behind[:, :, :1])], 2)


def _bounded_scores(query: Tensor, key: Tensor) -> Tensor:
    """[B, H, G · T, T] by one matrix product of decayed queries [B, H, G · T, W] and grown keys."""
    length = key.shape[2]
    later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    later = later.repeat(query.shape[2] // length, 1)
    # selected away, never multiplied: above the diagonal the products may be huge
    return (query @ key.transpose(2, 3)).masked_fill(later, 0)


def _pairwise_scores(query: Tensor, key: Tensor, log_decay: Tensor) -> Tensor:
    """[B, H, G · T, T] from the decay between each two tokens."""
    between = segment_sums(log_decay).exp()  # [B, H, T, T, W]
    return torch.einsum("bhgtw,bhtsw,bhsw->bhgts", query, between, key).flatten(2, 3)
