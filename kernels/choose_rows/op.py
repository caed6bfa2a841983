"""``fxgraft::choose_rows``: one of several values for each row of a batch.

A layer that can work in several ways computes each of them for the rows that use it. Where state
is kept in pools, an op whose value a row does not choose leaves that row's state alone.

Args:
    choice: integer [B], the number of the value that a row takes.
    options: values of one shape [B, ...].

Returns:
    [B, ...], contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxgraft.kernels.choose_rows import cost, reference
from fxgraft.kernels.define import define
from fxgraft.kernels.spec import OpSpec


def _fake(choice: Tensor, options: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(options[0], memory_format=torch.contiguous_format)


SPEC = define(
    OpSpec(name="choose_rows", kind="mask", reference=reference.choose_rows, flops=cost.flops),
    "(Tensor choice, Tensor[] options) -> Tensor",
    _fake,
)
