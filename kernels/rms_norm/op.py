"""``fxgraft::rms_norm``: x / sqrt(mean(x²) + eps) · (weight + offset), over the last dimension.

Source: Zhang and Sennrich, arXiv 1910.07467, eq. 4. The order of casts is Llama's: normalise in at
least float32, cast to x's dtype, then multiply.

Args:
    x: [..., D].
    weight: [D], or None for 1 (with any offset).
    eps: added to the mean of squares.
    offset: added to the weight (1 where a model stores weight - 1).

Returns:
    [..., D] in x's dtype, or the wider of x's and the weight's.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fxgraft.kernels.accelerate import on_cuda
from fxgraft.kernels.define import define
from fxgraft.kernels.rms_norm import cost, reference
from fxgraft.kernels.spec import OpSpec


def _rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float, offset: float = 0.0
) -> Tensor:
    """Use the library's normalisation where its output has the reference's strides."""
    if not x.is_contiguous():
        return reference.rms_norm(x, weight, eps=eps, offset=offset)
    # Its own weight would multiply before the cast.
    y = functional.rms_norm(x, x.shape[-1:], None, eps)
    return reference.scale(y, weight, offset)


def _cuda(x: Tensor, weight: Tensor | None = None, *, eps: float, offset: float = 0.0) -> Tensor:
    from fxgraft.kernels.rms_norm import triton

    if not triton.supports(x, weight):
        return _rms_norm(x, weight, eps=eps, offset=offset)
    return triton.rms_norm(x, weight, eps=eps, offset=offset)


SPEC = define(
    OpSpec(
        name="rms_norm",
        kind="norm",
        reference=reference.rms_norm,
        flops=cost.flops,
    ),
    "(Tensor x, Tensor? weight=None, *, float eps, float offset=0.0) -> Tensor",
    reference.rms_norm,
    _rms_norm,
)
on_cuda(SPEC, _cuda, _rms_norm)
