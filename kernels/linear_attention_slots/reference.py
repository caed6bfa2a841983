"""Linear attention over slots, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxgraft.kernels.linear_attention import reference as dense


def linear_attention_slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    mixing: Tensor,
    memory_cache: Tensor,
    slots: Tensor,
    past: Tensor,
    norm_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Attend and write; arguments and result are those of the op in ``op.py``."""
    return over_slots(
        dense.linear_attention,
        (query, key, value, gate, mixing, norm_weight),
        (memory_cache, slots, past),
        options,
    )


def over_slots(
    attend: Any,
    tensors: tuple[Tensor | None, ...],
    place: tuple[Tensor, Tensor, Tensor],
    options: dict[str, Any],
) -> Tensor:
    """Read the rows' states, attend, and write them.

    Args:
        attend: a form of ``linear_attention``.
        tensors: its arguments before ``key_mask``.
        place: pool, slots and past.
        options: its keyword arguments.
    """
    pool, slots, past = place
    active = (past >= 0) & (slots >= 0)
    rows = slots.clamp(min=0).long()
    found = pool.index_select(0, rows)
    started = (active & (past > 0)).view(-1, 1, 1, 1, 1)
    output, after = attend(*tensors, state=torch.where(started, found, 0), **options)
    is_active = active.view(-1, 1, 1, 1, 1)
    # Rows without a request put back what lies in the slot that belongs to nobody.
    pool.index_copy_(0, rows, torch.where(is_active, after.to(pool.dtype), found))
    return torch.where(active.view(-1, 1, 1, 1), output, 0)
