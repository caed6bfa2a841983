"""What a call of ``fxgraft::nm_linear`` may ask for beside the product, and its checks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.gated_activation.reference import ACTIVATIONS
from fxgraft.kernels.nm_linear.layout import Layout, layout_of


@dataclass(frozen=True)
class Parts:
    """The optional arguments, described in ``fxgraft.kernels.nm_linear.op``."""

    bias: Tensor | None = None
    residual: Tensor | None = None
    norm_weight: Tensor | None = None
    ends: Tensor | None = None
    activation: str | None = field(default=None, kw_only=True)
    eps: float | None = field(default=None, kw_only=True)
    norm_offset: float = field(default=0.0, kw_only=True)

    def output_shape(self, x: Tensor, values: Tensor) -> tuple[int, ...]:
        """Shape of the result."""
        return (*x.shape[:-1], values.shape[-2] // (1 if self.activation is None else 2))


ONLY_PRODUCT = Parts()


def check(
    x: Tensor, values: Tensor, indices: Tensor, parts: Parts, pattern: tuple[int, int]
) -> Layout:
    """Check all arguments; returns the layout of the weight, or of each expert's.

    Raises:
        InputError: they do not fit together.
    """
    layout = _check_weight(values, indices, parts.ends, pattern)
    features = values.shape[-2]
    floating = (x, values, parts.bias, parts.residual, parts.norm_weight)
    dtypes = {tensor.dtype for tensor in floating if tensor is not None}
    if len(dtypes) > 1:
        raise InputError(
            f"nm_linear's arguments have the dtypes {', '.join(sorted(map(str, dtypes)))}",
            "cast x, values, bias, residual and norm_weight to one dtype",
        )
    if x.dim() == 0 or x.shape[-1] != layout.columns:
        raise InputError(
            f"nm_linear's x is {list(x.shape)} for a weight [{features}, {layout.columns}]",
            "the last dimension of x is the number of inputs",
        )
    activation = parts.activation
    if activation is not None and (activation not in ACTIVATIONS or features % 2):
        raise InputError(
            f"nm_linear has the activation {activation!r} and {features} outputs",
            f"use one of {', '.join(ACTIVATIONS)} on gate and up of one size",
        )
    _check_shapes(x, values, parts, layout)
    return layout


def _check_weight(
    values: Tensor, indices: Tensor, ends: Tensor | None, pattern: tuple[int, int]
) -> Layout:
    if ends is None:
        return layout_of(values, indices, *pattern)
    count = ends.shape[0] if ends.dim() == 1 else 0
    is_stack = values.dim() == 5 and values.shape[0] == indices.shape[0] == count > 0
    if not is_stack or ends.dtype not in (torch.int32, torch.int64):
        raise InputError(
            f"nm_linear's ends are {ends.dtype} {list(ends.shape)} for values "
            f"{list(values.shape)} and indices {list(indices.shape)}",
            "pass one end, int32 or int64, for each weight of the stack",
        )
    return layout_of(values[0], indices[0], *pattern)


def _check_shapes(x: Tensor, values: Tensor, parts: Parts, layout: Layout) -> None:
    expected = (
        ("bias", parts.bias, (values.shape[-2],)),
        ("residual", parts.residual, parts.output_shape(x, values)),
        ("norm_weight", parts.norm_weight, (layout.columns,)),
    )
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise InputError(f"nm_linear's {name} is {list(tensor.shape)}", f"pass {list(shape)}")
    if parts.norm_weight is not None and parts.eps is None:
        raise InputError("nm_linear has a norm_weight but no eps", "pass the norm's eps")
