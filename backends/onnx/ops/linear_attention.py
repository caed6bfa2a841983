"""``linear_attention`` in ONNX: ``LinearAttention`` from opset 27 on, else a ``Scan``.

The operator has one state per head. N states of width Dk are one of width N · Dk, with the query
weighted by ``mixing``, the key written once per state, and the scale given, since its default
would be of the wider key. Gates, write factors, padding and norm are standard operators around
it. Before opset 27 the one-token form of the reference runs over the tokens in a ``Scan``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, Result, translates
from fxgraft.backends.onnx.recurrence import recurrent
from fxgraft.kernels.linear_attention import arguments
from fxgraft.kernels.linear_attention.op import SPEC
from fxgraft.kernels.spec import dims

FIRST_OPSET = 27
_scan = recurrent(SPEC)


@translates(SPEC.overload)
def linear_attention(c: Call) -> Result:
    """See the module's docstring; arguments are those of ``fxgraft.kernels.linear_attention``."""
    if c.given("cu_seqlens"):
        raise c.error("packed sequences have no ONNX form", "export the model on padded rows")
    return _operator(c) if c.b.opset >= FIRST_OPSET else _scan(c)


def _operator(c: Call) -> Result:
    output, last = c.result
    wide = torch.promote_types(c.dtype, torch.float32)
    query, key, value, decay = _inline(c, _packed, _BEFORE)
    heads, states, key_dim, value_dim = dims(last)[1:]
    merged = [dims(last)[0], heads, states * key_dim, value_dim]
    past = c.optional("state", wide)
    found, present = c.b.call_many(
        "LinearAttention",
        query,
        key,
        value,
        None if past is None else c.b.reshape(past, dims(last), merged),
        decay,
        dtypes=(wide, wide),
        q_num_heads=int(dims(output)[2]),
        kv_num_heads=int(heads),
        update_rule="gated",
        scale=1.0,
    )
    flat = [*dims(output)[:2], dims(output)[2] * value_dim]
    found = c.b.reshape(found, flat, dims(output))
    if c.given("norm_weight"):
        found = _normalized(c, found)
    present = c.b.reshape(present, merged, dims(last))
    return [c.b.cast(found, output.dtype), c.b.cast(present, last.dtype)]


_BEFORE = ("query", "key", "value", "gate", "mixing", "key_mask")


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    mixing: Tensor,
    key_mask: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operator reads, [B, S, heads · width] each: query, key, value and log decay."""
    options = arguments.Options(*(others[field.name] for field in fields(arguments.Options)))
    found = arguments.tokens(query, key, value, gate, mixing, key_mask, options)
    keys = found.key.expand(*found.log_decay.shape)
    parts = (found.query, keys, found.value, found.log_decay)
    query, key, value, decay = (part.flatten(2) for part in parts)
    return query, key, value, decay


def _normalized(c: Call, found: Value) -> Value:
    weight = c.value("norm_weight", found.dtype)
    squares = c.b.call("Mul", found, found)
    mean = c.b.call("ReduceMean", squares, c.b.integers(-1), keepdims=1)
    root = c.b.call("Sqrt", c.b.call("Add", mean, c.number(float(c.constant("eps")), found.dtype)))
    return c.b.call("Mul", c.b.call("Div", found, root), weight)


def _inline(c: Call, function: Callable[..., Any], names: tuple[str, ...]) -> list[Value]:
    """Trace a function of some of the op's arguments, and translate it."""
    examples = {name: node.meta["val"] for name, node in c.nodes().items() if name in names}
    values = {name: c.value(name) for name in examples}
    return c.context.inline(c, function, examples, values, c.b)
