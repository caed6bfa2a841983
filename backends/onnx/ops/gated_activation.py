"""``gated_activation`` in ONNX: the activation's operator and a product."""

from __future__ import annotations

from fxgraft.backends.onnx.aten.elementwise import gaussian_unit, swish
from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, translates
from fxgraft.kernels.gated_activation.op import SPEC

_OPERATORS = {"relu": "Relu", "sigmoid": "Sigmoid"}


@translates(SPEC.overload)
def gated_activation(c: Call) -> Value:
    """``activation(gate) · up``."""
    gate, up, activation = c.value("gate"), c.value("up", c.dtype), c.constant("activation")
    return c.b.call("Mul", _activate(c, gate, activation), up)


def _activate(c: Call, gate: Value, activation: str) -> Value:
    if activation == "silu":
        return swish(c, gate)
    if activation.startswith("gelu"):
        return gaussian_unit(c, gate, "tanh" if activation == "gelu_tanh" else "none")
    return c.b.call(_OPERATORS[activation], gate)
