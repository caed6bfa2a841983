"""``fxgraft::steer``: x + coefficient · vector where fire, else x.

Source: SEAL, arXiv 2504.07986. Coefficient and vector are cast to x's dtype, multiplied, then
added, as its authors do.

The other positions keep every bit, which adding 0 would not (-0.0 + 0.0 is 0.0, and a vector with
NaN would spread). Rows whose coefficient · vector is all 0 count as not fired, so their gradient
reaches x only.

Args:
    x: [B, S, D].
    fire: bool [B, S].
    vector: [D]; or [B, D] for a vector per row; or, with ``slot``, a table [T, D].
    coefficient: [], or [B] for a coefficient per row.
    slot: int64 [B], the row of the table that each row of x takes.

Returns:
    [B, S, D] in x's dtype.
"""

from __future__ import annotations

from torch import Tensor

from fxgraft.kernels.accelerate import on_cuda
from fxgraft.kernels.define import define
from fxgraft.kernels.spec import OpSpec
from fxgraft.kernels.steer import cost, reference


def _cuda(
    x: Tensor, fire: Tensor, vector: Tensor, coefficient: Tensor, slot: Tensor | None = None
) -> Tensor:
    from fxgraft.kernels.steer import triton

    if not triton.supports(x, vector, coefficient):
        return reference.steer(x, fire, vector, coefficient, slot)
    return triton.steer(x, fire, vector, coefficient, slot)


SPEC = define(
    OpSpec(
        name="steer",
        kind="intervention",
        reference=reference.steer,
        flops=cost.flops,
    ),
    "(Tensor x, Tensor fire, Tensor vector, Tensor coefficient, Tensor? slot=None) -> Tensor",
    reference.steer,
)
on_cuda(SPEC, _cuda, reference.steer)
