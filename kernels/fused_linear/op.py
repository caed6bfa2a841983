"""``fxgraft::fused_linear``: residual + activation(norm(x) Wᵀ + bias), each part optional.

h = x, or ``fxgraft::rms_norm(x, norm_weight, eps, norm_offset)`` if eps is given; y = h Wᵀ + bias;
with an activation, gate and up are the two halves of y and y = activation(gate) · up (the names are
those of ``fxgraft::gated_activation``); then residual + y.

Args:
    x: [..., K].
    weight: [N, K]; with an activation [2F, K], the rows of the gate first.
    bias: [N].
    norm_weight: [K], or None for 1; only with eps.
    residual: [..., N], or [..., F] with an activation.
    eps, norm_offset: of the norm; no norm if eps is None.
    activation: "silu", "gelu", "gelu_tanh", "relu", "sigmoid", or None.

Returns:
    [..., N], or [..., F] with an activation, contiguous. A row does not depend on other rows, but
    its rounding may depend on how many there are. On CUDA, up to 64 rows, nothing between x and
    the result is rounded to the dtype but what is normalised, and of one row not even that.

Raises:
    InputError: the dtypes differ, shapes do not fit, another activation, a norm weight without eps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.accelerate import on_cuda
from fxgraft.kernels.define import define
from fxgraft.kernels.fused_linear import cost, reference
from fxgraft.kernels.gated_activation.reference import ACTIVATIONS
from fxgraft.kernels.spec import OpSpec


def _check(
    x: Tensor,
    weight: Tensor,
    others: tuple[Tensor | None, ...],
    activation: str | None,
) -> None:
    dtypes = {t.dtype for t in (x, weight, *others) if t is not None}
    if len(dtypes) > 1:
        raise InputError(
            f"fused_linear's arguments have the dtypes {', '.join(sorted(map(str, dtypes)))}",
            "cast them to one dtype",
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise InputError(
            f"fused_linear's weight is {list(weight.shape)} for x {list(x.shape)}",
            "the weight is [out features, in features]",
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError(
            f"fused_linear knows no activation {activation!r}",
            f"use one of {', '.join(ACTIVATIONS)}",
        )
    if activation is not None and weight.shape[0] % 2:
        raise InputError(
            f"fused_linear has an activation and {weight.shape[0]} rows of weight",
            "stack the weights of gate and up, of one size",
        )


def _check_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    eps: float | None,
    activation: str | None,
) -> tuple[int, ...]:
    """Check, and tell the result's shape."""
    output = (*x.shape[:-1], weight.shape[0] // (1 if activation is None else 2))
    expected = (
        ("bias", bias, (weight.shape[0],)),
        ("norm_weight", norm_weight, (weight.shape[1],)),
        ("residual", residual, output),
    )
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise InputError(
                f"fused_linear's {name} is {list(tensor.shape)}", f"pass {list(shape)}"
            )
    if norm_weight is not None and eps is None:
        raise InputError("fused_linear has a norm_weight but no eps", "pass the norm's eps")
    return output


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float | None = None,
    norm_offset: float = 0.0,
    activation: str | None = None,
) -> Tensor:
    _check(x, weight, (bias, norm_weight, residual), activation)
    return x.new_empty(_check_shapes(x, weight, bias, norm_weight, residual, eps, activation))


def _fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float | None = None,
    norm_offset: float = 0.0,
    activation: str | None = None,
) -> Tensor:
    """The parts one after the other, each by the library or its own op."""
    _check(x, weight, (bias, norm_weight, residual), activation)
    shape = _check_shapes(x, weight, bias, norm_weight, residual, eps, activation)
    h = (
        x
        if eps is None
        else torch.ops.fxgraft.rms_norm(x, norm_weight, eps=eps, offset=norm_offset)
    )
    if residual is not None and activation is None and bias is None and x.is_cuda:
        flat = torch.addmm(residual.reshape(-1, shape[-1]), h.reshape(-1, h.shape[-1]), weight.t())
        return flat.view(shape)
    y = torch.nn.functional.linear(h, weight, bias)
    if activation is not None:
        gate, up = y.chunk(2, -1)
        y = torch.ops.fxgraft.gated_activation(gate, up, activation=activation)
    if residual is not None:
        y = residual + y
    return y.contiguous()


def _cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float | None = None,
    norm_offset: float = 0.0,
    activation: str | None = None,
) -> Tensor:
    from fxgraft.kernels.fused_linear import triton

    options: dict[str, Any] = {"eps": eps, "norm_offset": norm_offset, "activation": activation}
    config = triton.config_for(x, weight)
    if config is None:
        return _fused_linear(x, weight, bias, norm_weight, residual, **options)
    _check(x, weight, (bias, norm_weight, residual), activation)
    _check_shapes(x, weight, bias, norm_weight, residual, eps, activation)
    return triton.fused_linear(x, weight, bias, norm_weight, residual, config=config, **options)


SPEC = define(
    OpSpec(
        name="fused_linear",
        kind="linear",
        reference=reference.fused_linear,
        flops=cost.flops,
    ),
    "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? norm_weight=None, "
    "Tensor? residual=None, *, float? eps=None, float norm_offset=0.0, str? activation=None) "
    "-> Tensor",
    _fake,
    _fused_linear,
)
on_cuda(SPEC, _cuda, _fused_linear)
