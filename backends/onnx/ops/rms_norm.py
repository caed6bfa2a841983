"""``rms_norm`` in ONNX: ``RMSNormalization`` from opset 23, before it what runtimes fuse."""

from __future__ import annotations

import torch

from fxgraft.backends.onnx.aten.normalisation import unit_mean_square
from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, translates
from fxgraft.kernels.rms_norm.op import SPEC

_OPERATOR_SINCE = 23


@translates(SPEC.overload)
def rms_norm(c: Call) -> Value:
    """``x / √(mean(x²) + eps) · (weight + offset)``, normalised in at least float32."""
    given = c.fake("x").dtype
    wide = torch.promote_types(given, torch.float32)
    scale = _scale(c)
    if c.b.opset >= _OPERATOR_SINCE and given == wide and (scale is None or scale.dtype == given):
        scale = scale or c.b.full(c.dims("x")[-1:], 1, given)
        eps = float(c.constant("eps"))
        return c.b.call("RMSNormalization", c.value("x"), scale, axis=-1, epsilon=eps)
    normal = unit_mean_square(c, c.value("x", wide), c.constant("eps"))
    normal = c.b.cast(c.b.cast(normal, given), c.dtype)
    return normal if scale is None else c.b.call("Mul", normal, c.b.cast(scale, c.dtype))


def _scale(c: Call) -> Value | None:
    weight, offset = c.optional("weight"), c.constant("offset")
    if weight is None or not offset:
        return weight
    if weight.constant is not None:
        return c.b.constant(weight.constant + offset, weight.dtype, f"{weight.name}.shifted")
    return c.b.call("Add", weight, c.b.constant(float(offset), weight.dtype, "offset"))
