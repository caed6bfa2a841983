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

from torch import Tensor

from fxgraft.kernels.accelerate import on_cuda
from fxgraft.kernels.define import define
from fxgraft.kernels.gated_activation import cost, reference
from fxgraft.kernels.spec import OpSpec


def _cuda(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    from fxgraft.kernels.gated_activation import triton

    if not triton.supports(gate, up, activation):
        return reference.gated_activation(gate, up, activation=activation)
    return triton.gated_activation(gate, up, activation=activation)


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
on_cuda(SPEC, _cuda, reference.gated_activation)
