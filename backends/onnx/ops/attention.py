"""``attention`` in ONNX: matrix products, a softmax, and one additive mask that layers share.

1. Query heads that share a key head become rows of one product; keys are never repeated.
2. The mask is 0 (or the bias) and -inf. Rows that see no key, which the softmax makes NaN, are set
   to 0 at the end, where they can occur.
3. Scores are in at least float32.

The operator ``Attention`` of opset 23 is not used: it has no sinks and no chunks, and a query that
sees no key is not 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch

from fxgraft.backends.onnx.assembler import ONE, Dims
from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, translates
from fxgraft.backends.onnx.ops.visibility import visible_keys
from fxgraft.kernels.attention.op import SPEC


@dataclass(frozen=True)
class _Mask:
    """What is added to the scores.

    Attributes:
        value: broadcastable to [B, Hq, S, T].
        dims: its dimensions.
        may_hide_all: whether some query may see no key.
    """

    value: Value
    dims: Dims
    may_hide_all: bool


@translates(SPEC.overload)
def attention(c: Call) -> Value:
    """See the module's docstring; arguments are those of ``fxgraft.kernels.attention.op``."""
    b, given = c.b, c.dtype
    wide = torch.promote_types(given, torch.float32)
    batch, heads, length, width = c.dims("query")
    _, kv_heads, total, value_width = c.dims("value")
    groups = heads / kv_heads
    rows = [batch, kv_heads, groups * length]
    scale = b.constant(float(c.constant("scale")), wide, "scale")
    query = b.reshape(c.value("query", wide), c.dims("query"), [*rows, width])
    query = b.call("Mul", query, scale)
    key = b.transpose(c.value("key", wide), c.dims("key"), (0, 1, 3, 2))
    scores = _softcapped(c, b.call("MatMul", query, key))
    mask = _mask(c, wide, length, total)
    weights = _weights(c, scores, mask, [batch, kv_heads, groups, length, total])
    output = b.call("MatMul", weights, c.value("value", wide))
    output = b.reshape(output, [*rows, value_width], c.out_dims)
    if mask is not None and mask.may_hide_all and not c.given("sinks"):
        output = _blank(c, output, mask)
    return b.cast(output, given)


def _softcapped(c: Call, scores: Value) -> Value:
    cap = float(c.constant("softcap"))
    if cap <= 0:
        return scores
    limit = c.b.constant(cap, scores.dtype, "softcap")
    return c.b.call("Mul", c.b.call("Tanh", c.b.call("Div", scores, limit)), limit)


def _weights(c: Call, scores: Value, mask: _Mask | None, sizes: Dims) -> Value:
    """The softmax of scores [B, Hkv, G · S, T].

    Args:
        c: the node.
        scores: before the mask.
        mask: to be added.
        sizes: B, Hkv, G, S and T.
    """
    b, (batch, kv_heads, groups, length, total) = c.b, sizes
    flat = [batch, kv_heads, groups * length, total]
    # Heads of a group and queries share an axis; a mask with several of both needs it split.
    split = groups != 1 and length != 1 and (mask is not None or c.given("sinks"))
    shape = [batch, kv_heads, groups, length, total] if split else flat
    scores = b.reshape(scores, flat, shape)
    if mask is not None:
        scores = b.call("Add", scores, _aligned(c, mask, kv_heads, groups, split))
    if c.given("sinks"):
        weights = _softmax_with_sinks(c, scores, shape, kv_heads, groups)
    else:
        weights = b.call("Softmax", scores, axis=-1)
    return b.reshape(weights, shape, flat)


def _aligned(c: Call, mask: _Mask, kv_heads: sympy.Expr, groups: sympy.Expr, split: bool) -> Value:
    """A mask [B|1, Hq|1, S|1, T] that broadcasts to the grouped scores."""
    per_head = len(mask.dims) == 4 and mask.dims[1] != 1
    if not split and not (per_head and groups != 1):
        return mask.value
    batch, heads, length, total = [*[ONE] * (4 - len(mask.dims)), *mask.dims]
    if not split:
        # One query per head: the group's heads take the place of the queries.
        return c.b.reshape(mask.value, mask.dims, [batch, kv_heads, groups, total])
    spread = [kv_heads, groups] if heads != 1 else [ONE, ONE]
    return c.b.reshape(mask.value, mask.dims, [batch, *spread, length, total])


def _softmax_with_sinks(
    c: Call, scores: Value, shape: Dims, kv_heads: sympy.Expr, groups: sympy.Expr
) -> Value:
    """Softmax in whose denominator each head has one more logit."""
    b, total = c.b, shape[-1]
    heads = [kv_heads, groups, ONE] if len(shape) == 4 and groups != 1 else None
    per_head = heads or [kv_heads, *([groups] if len(shape) == 5 else []), ONE, ONE]
    sinks = b.reshape(c.value("sinks", scores.dtype), c.dims("sinks"), per_head)
    column = b.expand(sinks, per_head, [*shape[:-1], ONE])
    weights = b.call("Softmax", b.call("Concat", scores, column, axis=-1), axis=-1)
    return b.slice(weights, len(shape) - 1, 0, total)


def _mask(c: Call, wide: torch.dtype, length: sympy.Expr, total: sympy.Expr) -> _Mask | None:
    """Key mask, visibility rules and bias in one."""
    b, key_mask = c.b, c.optional("key_mask")
    visible = visible_keys(c, length, total, key_mask, c.dims("key_mask"))
    sizes = _visible_dims(c, length, total) if visible is not None else []
    bias, bias_dims = c.optional("bias"), c.dims("bias")
    if bias is None and visible is None:
        return None
    hidden = b.constant(-torch.inf, wide, "hidden")
    shown = b.constant(0.0, wide, "shown")
    if bias is not None and bias.dtype == torch.bool:
        visible = bias if visible is None else b.call("And", visible, bias)
    elif bias is not None:
        shown = b.cast(bias, wide)
    value = shown if visible is None else b.call("Where", visible, shown, hidden, dtype=wide)
    may_hide_all = key_mask is not None or bias is not None
    return _Mask(value, _broadcast(sizes, bias_dims), may_hide_all)


def _visible_dims(c: Call, length: sympy.Expr, total: sympy.Expr) -> list[sympy.Expr]:
    if not c.given("key_mask"):
        return [length, total]
    rules_alone = visible_keys(c, length, total, None, ())
    rows = ONE if rules_alone is None else length
    return [c.dims("key_mask")[0], ONE, rows, total]


def _broadcast(left: Dims, right: Dims) -> list[sympy.Expr]:
    rank = max(len(left), len(right))
    pairs = zip(*([*[ONE] * (rank - len(d)), *d] for d in (left, right)), strict=True)
    return [one if other == 1 else other for one, other in pairs]


def _blank(c: Call, output: Value, mask: _Mask) -> Value:
    """0 where a query sees no key."""
    b, dtype = c.b, output.dtype
    assert dtype is not None
    best = b.call("ReduceMax", mask.value, b.integers(-1), keepdims=1)
    hidden = b.constant(-torch.inf, dtype, "hidden")
    sees = b.call("Greater", best, hidden, dtype=torch.bool)
    return b.call("Where", sees, output, b.constant(0.0, dtype, "nothing"), dtype=dtype)
