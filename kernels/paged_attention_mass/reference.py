"""``paged_attention_mass`` in plain PyTorch, one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fxgraft.kernels.attention_mass import reference as dense
from fxgraft.kernels.paged_attention import reference as paged


def paged_attention_mass(
    query: Tensor,
    key: Tensor,
    chosen: Tensor,
    key_cache: Tensor,
    chosen_cache: Tensor,
    table: Tensor,
    past: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    normalize: bool = True,
) -> Tensor:
    """Write and sum up; arguments and result are those of the op in ``op.py``."""
    paged.write(key, key_cache, table, past)
    # As entries of one head and one channel.
    flags = chosen_cache[:, None, :, None]
    paged.write(chosen[:, None, :, None], flags, table, past)
    scores = empty_output(query).zero_()
    for row, length in enumerate(paged.lengths(past)):
        if length < 0:
            continue
        first = 0 if window is None else max(0, length + 1 - window)
        end = length + query.shape[2]
        keys, counts = (paged.read(cache, table[row], first, end) for cache in (key_cache, flags))
        scores[row] = dense.attention_mass(
            query[row : row + 1],
            keys,
            counts[:, 0, :, 0],
            sinks=sinks,
            scale=scale,
            window=window,
            softcap=softcap,
            normalize=normalize,
        )[0]
    return scores


def empty_output(query: Tensor) -> Tensor:
    """A score per head and token, [B, H, S]."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape[:3], dtype=dtype)
