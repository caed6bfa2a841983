"""``fxgraft::causal_mask``: the keep-mask that ``fxgraft::attention`` applies.

Args:
    key_mask: bool [B, T], False for padding.
    query_length: S <= T, the number of queries; they sit at the last S positions.
    is_causal, window, chunk: see ``fxgraft.kernels.attention.mask.visible_keys``.

Returns:
    bool [B, 1, S, T], True where the query sees the key.

Raises:
    InputError: there are more queries than keys, or a window is not causal.
"""

from __future__ import annotations

from torch import Tensor

from fxgraft.kernels.attention.mask import check_lengths, check_rules
from fxgraft.kernels.causal_mask import cost, reference
from fxgraft.kernels.define import define
from fxgraft.kernels.spec import OpSpec, argument


def _fake(
    key_mask: Tensor,
    query_length: int,
    *,
    is_causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    check_rules(is_causal, window, chunk)
    batch, total = key_mask.shape
    return key_mask.new_empty((batch, 1, query_length, total))


def _causal_mask(
    key_mask: Tensor,
    query_length: int,
    *,
    is_causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    check_rules(is_causal, window, chunk)
    check_lengths(query_length, key_mask.shape[1], is_causal, chunk)
    return reference.causal_mask(
        key_mask, query_length, is_causal=is_causal, window=window, chunk=chunk
    )


SPEC = define(
    OpSpec(
        name="causal_mask",
        kind="mask",
        reference=reference.causal_mask,
        flops=cost.flops,
        total_dims={"key_mask": 1},
        causal=lambda node: bool(argument(node, "is_causal")),
    ),
    "(Tensor key_mask, SymInt query_length, *, bool is_causal=True, int? window=None, "
    "int? chunk=None) -> Tensor",
    _fake,
    _causal_mask,
)
