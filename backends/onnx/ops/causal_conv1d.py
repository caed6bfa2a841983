"""``causal_conv1d`` in ONNX: a depthwise ``Conv`` over past and present, for one token a sum."""

from __future__ import annotations

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch

from fxgraft.backends.onnx.aten.elementwise import swish
from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, translates
from fxgraft.kernels.causal_conv1d.op import SPEC

_END = torch.iinfo(torch.int64).max


@translates(SPEC.overload)
def causal_conv1d(c: Call) -> tuple[Value, Value]:
    """The output, and the last inputs as the state."""
    b, (batch, channels, length) = c.b, c.dims("x")
    width = int(c.dims("weight")[1])
    past = c.optional("state", c.dtype)
    past = past or b.full((batch, channels, sympy.Integer(width - 1)), 0, c.dtype)
    window = b.call("Concat", past, c.value("x"), axis=2)
    weight = c.value("weight", c.dtype)
    bias = c.optional("bias", c.dtype)
    if length == 1:
        output = b.call("ReduceSum", b.call("Mul", window, weight), b.integers(-1), keepdims=1)
        if bias is not None:
            output = b.call("Add", output, b.unsqueeze(bias, c.dims("bias"), 1))
    else:
        taps = b.unsqueeze(weight, c.dims("weight"), 1)
        output = b.call("Conv", window, taps, bias, group=int(channels))
    if c.constant("activation") == "silu":
        output = swish(c, output)
    # One tap has no past, and -0 would mean from the beginning.
    return output, b.slice(window, 2, 1 - width or _END, _END)
