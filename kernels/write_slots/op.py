"""``fxgraft::write_slots``: fixed state of the rows of a batch, into a pool of slots.

Args:
    pool: [N, ...], changed in place.
    slots: int64 [B], the slot of each row. Slot 0 belongs to nobody: rows without a request, of
        which there may be several, write there.
    value: [B, ...].
"""

from __future__ import annotations

from torch import Tensor

from fxgraft.kernels.define import define
from fxgraft.kernels.spec import OpSpec
from fxgraft.kernels.write_slots import cost, reference


def _fake(pool: Tensor, slots: Tensor, value: Tensor) -> None:
    return None


SPEC = define(
    OpSpec(name="write_slots", kind="state", reference=reference.write_slots, flops=cost.flops),
    "(Tensor(a!) pool, Tensor slots, Tensor value) -> ()",
    _fake,
)
