"""``nm_linear`` in ONNX: the packed weight is unpacked by standard operators, then multiplied.

The file stays as small as the packed weights. Nothing is folded here; the option
``dense_weights`` stores dense weights instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, translates
from fxgraft.kernels.nm_linear.layout import layout_of
from fxgraft.kernels.nm_linear.op import SPEC
from fxgraft.kernels.nm_linear.packing import expand, kept_columns
from fxgraft.packed_weights import grouped_product


@translates(SPEC.overload)
def nm_linear(call: Call) -> Value:
    """Inlined, with the packed weights left as they are."""
    if any(call.given(name) for name in ("activation", "residual", "eps")):
        raise call.error(
            "norm, activation and residual are added when a Program is lowered for a GPU"
        )
    examples = {name: node.meta["val"] for name, node in call.nodes().items()}
    values = {n: call.value(n) for n, fake in examples.items() if isinstance(fake, Tensor)}
    for name in ("values", "indices"):
        # Behind a node it is no constant that the translation would fold.
        values[name] = call.b.call("Identity", values[name])
    return call.context.inline(call, _unpack_and_multiply, examples, values, call.b)[0]


def _unpack_and_multiply(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    *,
    ends: Tensor | None = None,
    n: int,
    m: int,
    **_: Any,
) -> Tensor:
    if ends is None:
        return functional.linear(x, _unpack(values, indices, n, m), bias)
    experts, features = values.shape[0], values.shape[3]
    packed = (values.movedim(0, 2).flatten(2, 3), indices.movedim(0, 2).flatten(2, 3))
    weights = _unpack(*packed, n, m).reshape(experts, features, -1).transpose(1, 2)
    y = grouped_product()(x.reshape(-1, x.shape[-1]), weights, ends)
    y = y.reshape(*x.shape[:-1], features)
    return y if bias is None else y + bias


def _unpack(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    layout = layout_of(values, indices, n, m)
    dense = expand(values, kept_columns(indices, layout, _bit_field))
    return dense.permute(1, 0, 2, 3).reshape(values.shape[2], layout.columns)


def _bit_field(words: Tensor, shifts: Tensor, bits: int) -> Tensor:
    """``bit_field`` by division: ONNX shifts unsigned integers only."""
    shifted = torch.div(words, 2**shifts, rounding_mode="floor")
    return torch.remainder(shifted, 2**bits)
