"""Tensors made from numbers and sizes."""

from __future__ import annotations

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch

from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, translates

aten = torch.ops.aten


@translates(
    aten.full.default, aten.full_like.default, aten.new_full.default,
)  # fmt: skip
def full(c: Call) -> Value:
    """One number everywhere."""
    number = c.plain("fill_value")
    if isinstance(number, sympy.Expr):
        return c.b.expand(c.value("fill_value", c.dtype), (), c.out_dims)
    return c.b.full(c.out_dims, number, c.dtype)


@translates(aten.fill.Scalar, aten.fill.Tensor)
def fill(c: Call) -> Value:
    """A given number everywhere."""
    return c.b.expand(c.value("value", c.dtype), (), c.out_dims)


@translates(aten.copy.default)
def copy(c: Call) -> Value:
    """``src``, in the shape and element type of ``self``."""
    return c.b.expand(c.value("src", c.dtype), c.dims("src"), c.out_dims)


@translates(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def ones(c: Call) -> Value:
    """1 everywhere."""
    return c.b.full(c.out_dims, 1, c.dtype)


@translates(
    aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default,
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default,
)  # fmt: skip
def zeros(c: Call) -> Value:
    """0 everywhere; an uninitialised tensor may hold it too."""
    return c.b.full(c.out_dims, 0, c.dtype)


@translates(aten.scalar_tensor.default)
def scalar_tensor(c: Call) -> Value:
    """One number."""
    return c.value("s", c.dtype)


@translates(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(c: Call) -> Value:
    """``start``, ``start + step``, ... below ``end``."""
    if any(isinstance(c.arguments.get(name), float) for name in ("start", "end", "step")):
        bounds = [c.as_value(c.arguments.get(n, d), torch.float32)
                  for n, d in (("start", 0), ("end", 0), ("step", 1))]  # fmt: skip
        return c.b.cast(c.b.call("Range", *bounds), c.dtype)
    step = c.size("step", default=1)
    if step == 1:
        return c.b.cast(c.b.range(c.size("start"), c.size("end")), c.dtype)
    bounds = [c.b.scalar(size) for size in (c.size("start"), c.size("end"), step)]
    return c.b.cast(c.b.call("Range", *bounds, dtype=torch.int64), c.dtype)


@translates(aten.eye.default)
def eye(c: Call) -> Value:
    """The unit matrix."""
    rows, columns = c.out_dims
    row = c.b.unsqueeze(c.b.range(0, rows), (rows,), 1)
    same = c.b.call("Equal", row, c.b.range(0, columns), dtype=torch.bool)
    return c.b.cast(same, c.dtype)


@translates(aten.triu.default)
def upper_triangle(c: Call) -> Value:
    """0 below a diagonal."""
    return _triangle(c, upper=1)


@translates(aten.tril.default)
def lower_triangle(c: Call) -> Value:
    """0 above a diagonal."""
    return _triangle(c, upper=0)


def _triangle(c: Call, upper: int) -> Value:
    diagonal = c.b.scalar(c.size("diagonal"))
    # onnxruntime's Trilu has no kernels for small types.
    wide = torch.int64 if c.dtype == torch.bool else c.dtype
    result = c.b.call("Trilu", c.value("self", wide), diagonal, upper=upper)
    return c.b.cast(result, c.dtype)
