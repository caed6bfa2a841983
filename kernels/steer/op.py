"""``fxgraft::steer``: x + coefficient · vector where fire, else x.

Source: SEAL, arXiv 2504.07986. Coefficient and vector are cast to x's dtype, multiplied, then
added, as its authors do.

The other positions keep every bit, which adding 0 would not (-0.0 + 0.0 is 0.0, and a vector with
NaN would spread). Rows whose coefficient · vector is all 0 count as not fired, so their gradient
reaches x only.

Args:
    x: [B, S, D].
    fire: bool [B, S].
    vector: [D], or [B, D] for a vector per row.
    coefficient: [], or [B] for a coefficient per row.

Returns:
    [B, S, D] in x's dtype.
"""

from __future__ import annotations

from fxgraft.kernels.define import define
from fxgraft.kernels.spec import OpSpec
from fxgraft.kernels.steer import cost, reference

SPEC = define(
    OpSpec(
        name="steer",
        kind="intervention",
        reference=reference.steer,
        flops=cost.flops,
    ),
    "(Tensor x, Tensor fire, Tensor vector, Tensor coefficient) -> Tensor",
    reference.steer,
)
