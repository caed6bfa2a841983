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


@translates(SPEC.overload)
def nm_linear(call: Call) -> Value:
    """Inlined, with the packed weights left as they are."""
    if call.given("activation") or call.given("residual"):
        raise call.error("activation and residual are added when a Program is lowered for a GPU")
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
    n: int,
    m: int,
    **_: Any,
) -> Tensor:
    layout = layout_of(values, indices, n, m)
    dense = expand(values, kept_columns(indices, layout, _bit_field))
    weight = dense.permute(1, 0, 2, 3).reshape(values.shape[2], layout.columns)
    return functional.linear(x, weight, bias)


def _bit_field(words: Tensor, shifts: Tensor, bits: int) -> Tensor:
    """``bit_field`` by division: ONNX shifts unsigned integers only."""
    shifted = torch.div(words, 2**shifts, rounding_mode="floor")
    return torch.remainder(shifted, 2**bits)
