"""``fxgraft::head_gate``: per row, the heads of the highest scores stay, the others are scaled.

A head stays if fewer than ``keep`` heads are ahead of it; a head is ahead by a higher score, or by
a lower index at the same score. NaN counts as the lowest score. Rows that are not gated keep every
bit. The choice has no gradient.

Source: SPIN, arXiv 2505.16411.

Args:
    x: [B, H, S, D], outputs of heads.
    score: [B|1, H, S|1].
    rows: bool [B, S], the rows to gate.
    keep: number of heads that stay in a gated row.
    factor: what the others are multiplied by.

Returns:
    [B, H, S, D] in x's dtype.

Raises:
    InputError: ``keep`` is negative, or the scores are of another number of heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.define import define
from fxgraft.kernels.head_gate import cost, reference
from fxgraft.kernels.spec import OpSpec


def _check(x: Tensor, score: Tensor, keep: int) -> None:
    if keep < 0:
        raise InputError(f"head_gate keeps {keep} heads", "keep 0 or more")
    if x.shape[1] != score.shape[1]:
        raise InputError(
            f"head_gate has {x.shape[1]} heads and scores of {score.shape[1]}",
            "give a score per head",
        )


def _fake(x: Tensor, score: Tensor, rows: Tensor, *, keep: int, factor: float) -> Tensor:
    _check(x, score, keep)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _head_gate(x: Tensor, score: Tensor, rows: Tensor, *, keep: int, factor: float) -> Tensor:
    _check(x, score, keep)
    return reference.head_gate(x, score, rows, keep=keep, factor=factor)


SPEC = define(
    OpSpec(
        name="head_gate",
        kind="intervention",
        reference=reference.head_gate,
        flops=cost.flops,
    ),
    "(Tensor x, Tensor score, Tensor rows, *, int keep, float factor) -> Tensor",
    _fake,
    _head_gate,
)
