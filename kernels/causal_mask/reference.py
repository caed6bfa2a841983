"""The attention mask in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from fxgraft.kernels.attention.mask import visible_keys


def causal_mask(
    key_mask: Tensor,
    query_length: int,
    *,
    is_causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Build the keep-mask; arguments and result are those of ``fxgraft.kernels.causal_mask.op``."""
    visible = visible_keys(
        query_length,
        key_mask.shape[1],
        key_mask,
        device=key_mask.device,
        is_causal=is_causal,
        window=window,
        chunk=chunk,
    )
    assert visible is not None
    return key_mask.new_ones((query_length, 1)) & visible
