"""Complex numbers as pairs: a last dimension of size 2 holds real and imaginary part.

Models use them for rotary embeddings. The operators in ``ON_PAIRS`` treat the pair like any other
trailing dimension; all others are refused.
"""

from __future__ import annotations

import torch

from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, translates

aten = torch.ops.aten

ON_PAIRS = frozenset(map(str, (
    aten.slice.Tensor, aten.unsqueeze.default, aten.select.int, aten.to.dtype,
    aten.to.dtype_layout, aten.to.device, aten.contiguous.default, aten.alias.default,
    aten.clone.default, aten.mul.Tensor, aten.polar.default, aten.view_as_complex.default,
    aten.view_as_real.default,
)))  # fmt: skip


@translates(aten.polar.default)
def polar(c: Call) -> Value:
    """``abs · (cos angle + i sin angle)``."""
    b, size, angle = c.b, c.value("abs"), c.value("angle")
    parts = [b.call("Mul", size, b.call(op, angle)) for op in ("Cos", "Sin")]
    rank = len(c.dims("angle"))
    pairs = [b.unsqueeze(part, c.dims("angle"), rank) for part in parts]
    return b.call("Concat", *pairs, axis=rank)


@translates(aten.view_as_complex.default, aten.view_as_real.default)
def same_pairs(c: Call) -> Value:
    """Pairs are what complex numbers are here."""
    return c.value("self")


def product(c: Call) -> Value:
    """``self · other``, one of which may be real."""
    b, last = c.b, len(c.out_dims) - 1
    for one, other in (("self", "other"), ("other", "self")):
        if not c.is_complex(other):
            factor = c.value(other, c.dtype)
            shape = c.dims(other)
            return b.call("Mul", c.value(one), b.unsqueeze(factor, shape, len(shape)))
    (a, ai), (d, di) = (
        [b.slice(c.value(name), len(c.dims(name)) - 1, part, part + 1) for part in (0, 1)]
        for name in ("self", "other")
    )
    real = b.call("Sub", b.call("Mul", a, d), b.call("Mul", ai, di))
    imaginary = b.call("Add", b.call("Mul", a, di), b.call("Mul", ai, d))
    return b.call("Concat", real, imaginary, axis=last)
