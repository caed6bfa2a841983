"""``rotary`` in ONNX: ``RotaryEmbedding`` from opset 23, before it five primitives.

The operator takes one table per row of the batch, so a table that rows share is repeated, once for
all layers. The primitives have the signs of the quarter turn folded into the sines.
"""

from __future__ import annotations

import torch

from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, translates
from fxgraft.kernels.rotary.op import SPEC

_OPERATOR_SINCE = 23
_OPERATOR_TYPES = (torch.float32, torch.float16)


@translates(SPEC.overload)
def rotary(c: Call) -> Value:
    """Rotate pairs of the first channels; the rest passes through."""
    given = c.fake("x").dtype
    is_plain = given == c.fake("cos").dtype and given in _OPERATOR_TYPES
    if c.b.opset >= _OPERATOR_SINCE and is_plain:
        return _operator(c)
    return _primitives(c)


def _operator(c: Call) -> Value:
    width = int(c.dims("cos")[-1])
    return c.b.call(
        "RotaryEmbedding",
        c.value("x"),
        _half_table(c, "cos"),
        _half_table(c, "sin"),
        interleaved=int(c.constant("interleaved")),
        rotary_embedding_dim=width if width < int(c.dims("x")[-1]) else None,
    )


def _half_table(c: Call, name: str) -> Value:
    """Each angle once instead of twice, for each row of the batch: [B, S, R / 2]."""
    batch, _, length, width = c.dims(name)
    half = width / 2
    step = 2 if c.constant("interleaved") else 1
    table = c.b.slice(c.value(name), 3, 0, half * step, step)
    table = c.b.squeeze(table, [*c.dims(name)[:3], half], 1)
    return c.b.expand(table, [batch, length, half], [c.dims("x")[0], length, half])


def _primitives(c: Call) -> Value:
    """``x · cos + swapped(x) · signed(sin)``."""
    head_dim, width = int(c.dims("x")[-1]), int(c.dims("cos")[-1])
    given = c.fake("x").dtype
    wide = torch.promote_types(given, c.fake("cos").dtype)
    x, rest = c.value("x"), None
    if width < head_dim:
        parts = c.b.integers(width, head_dim - width)
        x, rest = c.b.call_many("Split", x, parts, dtypes=(x.dtype, x.dtype), axis=-1)
    x = c.b.cast(x, wide)
    sines = c.b.call("Mul", c.value("sin", wide), _signs(c, width, wide))
    straight = c.b.call("Mul", x, c.value("cos", wide))
    turned = c.b.call("Mul", _swapped(c, x, width), sines)
    result = c.b.cast(c.b.call("Add", straight, turned), given)
    return result if rest is None else c.b.call("Concat", result, rest, axis=-1)


def _signs(c: Call, width: int, dtype: torch.dtype) -> Value:
    minus, plus = -torch.ones(width // 2, dtype=dtype), torch.ones(width // 2, dtype=dtype)
    apart = torch.stack((minus, plus), -1).flatten()
    signs = apart if c.constant("interleaved") else torch.cat((minus, plus))
    return c.b.constant(signs, name="rotary_signs")


def _swapped(c: Call, x: Value, width: int) -> Value:
    """The two channels of each pair exchanged."""
    if c.constant("interleaved"):
        order = torch.arange(width).view(-1, 2).flip(-1).flatten()
        return c.b.call("Gather", x, c.b.constant(order, name="rotary_order"), axis=-1)
    halves = c.b.integers(width // 2, width // 2)
    first, second = c.b.call_many("Split", x, halves, dtypes=(x.dtype, x.dtype), axis=-1)
    return c.b.call("Concat", second, first, axis=-1)
