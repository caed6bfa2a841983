"""``fxgraft::read_slots``: fixed state of the rows of a batch, from a pool of slots.

Args:
    pool: [N, ...].
    slots: int64 [B], the slot of each row.
    past: int32 [B], number of tokens that a row has seen; rows without any start from zeros.

Returns:
    [B, ...].
"""

from __future__ import annotations

from torch import Tensor

from fxgraft.kernels.define import define
from fxgraft.kernels.read_slots import cost, reference
from fxgraft.kernels.spec import OpSpec


def _fake(pool: Tensor, slots: Tensor, past: Tensor) -> Tensor:
    return pool.new_empty((slots.shape[0], *pool.shape[1:]))


SPEC = define(
    OpSpec(name="read_slots", kind="state", reference=reference.read_slots, flops=cost.flops),
    "(Tensor pool, Tensor slots, Tensor past) -> Tensor",
    _fake,
)
