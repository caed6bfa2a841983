"""``fxgraft::gated_activation``: activation(gate) · up, elementwise.

Source: Shazeer, arXiv 2002.05202, eq. 5 and 6.

Args:
    gate, up: one shape [..., F].
    activation: "silu", "gelu" (by erf), "gelu_tanh" (by tanh), "relu" or "sigmoid".

Returns:
    [..., F].

Raises:
    InputError: another activation.
"""

from __future__ import annotations

from fxgraft.kernels.define import define
from fxgraft.kernels.gated_activation import cost, reference
from fxgraft.kernels.spec import OpSpec

SPEC = define(
    OpSpec(
        name="gated_activation",
        kind="activation",
        reference=reference.gated_activation,
        flops=cost.flops,
    ),
    "(Tensor gate, Tensor up, *, str activation) -> Tensor",
    reference.gated_activation,
)
