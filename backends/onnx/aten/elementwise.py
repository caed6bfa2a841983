"""Arithmetic, comparisons, logic and activations."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from fxgraft.backends.onnx.aten.complex import product as complex_product
from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, Translate, translates

aten = torch.ops.aten

_BINARY = {
    "Max": (aten.maximum.default, aten.max.other),
    "Min": (aten.minimum.default, aten.min.other),
    "And": (aten.logical_and.default,),
    "Or": (aten.logical_or.default,),
    "Xor": (aten.logical_xor.default,),
}
_COMPARISONS = {
    "Equal": (aten.eq.Tensor, aten.eq.Scalar),
    "Less": (aten.lt.Tensor, aten.lt.Scalar),
    "LessOrEqual": (aten.le.Tensor, aten.le.Scalar),
    "Greater": (aten.gt.Tensor, aten.gt.Scalar),
    "GreaterOrEqual": (aten.ge.Tensor, aten.ge.Scalar),
}
_UNARY = {
    "Abs": (aten.abs.default,),
    "Acos": (aten.acos.default,),
    "Asin": (aten.asin.default,),
    "Atan": (aten.atan.default,),
    "Ceil": (aten.ceil.default,),
    "Cos": (aten.cos.default,),
    "Cosh": (aten.cosh.default,),
    "Erf": (aten.erf.default,),
    "Exp": (aten.exp.default,),
    "Floor": (aten.floor.default,),
    "HardSwish": (aten.hardswish.default,),
    "IsNaN": (aten.isnan.default,),
    "IsInf": (aten.isinf.default,),
    "Log": (aten.log.default,),
    "Mish": (aten.mish.default,),
    "Neg": (aten.neg.default,),
    "Reciprocal": (aten.reciprocal.default,),
    "Relu": (aten.relu.default,),
    "Round": (aten.round.default,),
    "Sigmoid": (aten.sigmoid.default,),
    "Sign": (aten.sign.default,),
    "Sin": (aten.sin.default,),
    "Sinh": (aten.sinh.default,),
    "Sqrt": (aten.sqrt.default,),
    "Tan": (aten.tan.default,),
    "Tanh": (aten.tanh.default,),
}
_ANY_TYPE = frozenset({"IsNaN", "IsInf"})


def _binary(op: str) -> Translate:
    logical = op in ("And", "Or", "Xor")

    def translate(c: Call) -> Value:
        dtype = torch.bool if logical else c.dtype
        return c.b.call(op, c.value("self", dtype), c.value("other", dtype))

    return translate


def _comparison(op: str) -> Translate:
    def translate(c: Call) -> Value:
        left, right = _common(c)
        return c.b.call(op, left, right, dtype=torch.bool)

    return translate


def _unary(op: str) -> Translate:
    def translate(c: Call) -> Value:
        given = c.fake("self").dtype if op in _ANY_TYPE else c.dtype
        return c.b.call(op, c.value("self", given), dtype=c.dtype)

    return translate


for _op, _targets in _BINARY.items():
    translates(*_targets)(_binary(_op))
for _op, _targets in _COMPARISONS.items():
    translates(*_targets)(_comparison(_op))
for _op, _targets in _UNARY.items():
    translates(*_targets)(_unary(_op))


def _common(c: Call) -> tuple[Value, Value]:
    """``self`` and ``other`` in the type in which PyTorch compares them."""
    items = [c.arguments[name] for name in ("self", "other")]
    fakes = [item.meta["val"] if isinstance(item, Node) else item for item in items]
    numbers = [0 if isinstance(fake, torch.SymInt) else fake for fake in fakes]
    dtype = torch.result_type(*numbers)
    # onnxruntime compares no booleans by size and knows few small integers.
    dtype = torch.int32 if dtype in (torch.bool, torch.uint8, torch.int8, torch.int16) else dtype
    return c.value("self", dtype), c.value("other", dtype)


@translates(aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor)
def multiply(c: Call) -> Value:
    """A product; of booleans their conjunction, with a reciprocal a division."""
    if c.dtype == torch.bool:
        return c.b.call("And", c.value("self"), c.value("other"))
    if c.dtype.is_complex:
        return complex_product(c)
    left, right = c.value("self", c.dtype), c.value("other", c.dtype)
    for one, other in ((left, right), (right, left)):
        producer = other.producer
        if producer is not None and producer.op == "Reciprocal":
            return c.b.call("Div", one, producer.inputs[0])
    return c.b.call("Mul", left, right)


@translates(aten.add.Tensor, aten.add.Scalar)
def add(c: Call) -> Value:
    """``self + alpha · other``; of booleans their disjunction."""
    if c.dtype == torch.bool:
        return c.b.call("Or", c.value("self"), c.value("other"))
    return c.b.call("Add", c.value("self", c.dtype), _times_alpha(c, "other"))


@translates(aten.sub.Tensor, aten.sub.Scalar)
def subtract(c: Call) -> Value:
    """``self - alpha · other``."""
    return c.b.call("Sub", c.value("self", c.dtype), _times_alpha(c, "other"))


@translates(aten.rsub.Scalar, aten.rsub.Tensor)
def subtract_from(c: Call) -> Value:
    """``other - alpha · self``."""
    return c.b.call("Sub", c.value("other", c.dtype), _times_alpha(c, "self"))


def _times_alpha(c: Call, name: str) -> Value:
    value, alpha = c.value(name, c.dtype), c.constant("alpha")
    return value if alpha in (None, 1) else c.b.call("Mul", value, c.number(alpha))


@translates(aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode)
def divide(c: Call) -> Value:
    """True division, or rounded down or towards zero."""
    mode = c.constant("rounding_mode")
    if mode == "floor":
        return _floor_divide(c)
    result = c.b.call("Div", c.value("self", c.dtype), c.value("other", c.dtype))
    if mode == "trunc" and c.dtype.is_floating_point:
        return _truncate(c, result)
    return result


@translates(aten.trunc.default)
def truncate(c: Call) -> Value:
    """Round towards zero."""
    return _truncate(c, c.value("self"))


def _truncate(c: Call, value: Value) -> Value:
    return c.b.call("Mul", c.b.call("Sign", value), c.b.call("Floor", c.b.call("Abs", value)))


@translates(aten.floor_divide.default)
def floor_divide(c: Call) -> Value:
    """Division rounded down."""
    return _floor_divide(c)


def _floor_divide(c: Call) -> Value:
    """ONNX's integer division rounds towards zero."""
    left, right = c.value("self", c.dtype), c.value("other", c.dtype)
    if c.dtype.is_floating_point:
        return c.b.call("Floor", c.b.call("Div", left, right))
    whole = c.b.call("Sub", left, c.b.call("Mod", left, right))
    return c.b.call("Div", whole, right)


@translates(aten.remainder.Tensor, aten.remainder.Scalar)
def remainder(c: Call) -> Value:
    """The remainder with the divisor's sign."""
    left, right = c.value("self", c.dtype), c.value("other", c.dtype)
    if not c.dtype.is_floating_point:
        return c.b.call("Mod", left, right)
    quotient = c.b.call("Floor", c.b.call("Div", left, right))
    return c.b.call("Sub", left, c.b.call("Mul", right, quotient))


@translates(aten.fmod.Tensor, aten.fmod.Scalar)
def remainder_towards_zero(c: Call) -> Value:
    """The remainder with the sign of ``self``."""
    return c.b.call("Mod", c.value("self", c.dtype), c.value("other", c.dtype), fmod=1)


@translates(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def power(c: Call) -> Value:
    """``self`` to the power of ``exponent``."""
    return c.b.call("Pow", c.value("self", c.dtype), c.value("exponent", c.dtype))


@translates(aten.square.default)
def square(c: Call) -> Value:
    """``self²``."""
    return c.b.call("Mul", c.value("self"), c.value("self"))


@translates(aten.rsqrt.default)
def reciprocal_root(c: Call) -> Value:
    """``1 / √self``."""
    return c.b.call("Reciprocal", c.b.call("Sqrt", c.value("self", c.dtype)))


@translates(aten.exp2.default)
def power_of_two(c: Call) -> Value:
    """``2^self``."""
    return c.b.call("Pow", c.number(2), c.value("self", c.dtype))


@translates(aten.expm1.default)
def exponential_minus_one(c: Call) -> Value:
    """``e^self - 1``, in float64 so that small numbers keep their digits."""
    wide = c.b.call("Exp", c.value("self", torch.float64))
    return c.b.cast(c.b.call("Sub", wide, c.number(1, torch.float64)), c.dtype)


@translates(aten.log1p.default)
def log_one_plus(c: Call) -> Value:
    """``log(1 + self)``, in float64 so that small numbers keep their digits."""
    wide = c.b.call("Add", c.value("self", torch.float64), c.number(1, torch.float64))
    return c.b.cast(c.b.call("Log", wide), c.dtype)


@translates(aten.log2.default)
def log_two(c: Call) -> Value:
    """The logarithm to base 2."""
    return c.b.call("Mul", c.b.call("Log", c.value("self", c.dtype)), c.number(1 / math.log(2)))


@translates(aten.ne.Tensor, aten.ne.Scalar)
def not_equal(c: Call) -> Value:
    """``self ≠ other``."""
    return c.b.call("Not", c.b.call("Equal", *_common(c), dtype=torch.bool))


@translates(aten.bitwise_not.default, aten.logical_not.default)
def invert(c: Call) -> Value:
    """Logical negation, or of integers that of every bit."""
    if c.dtype == torch.bool:
        return c.b.call("Not", c.value("self", torch.bool))
    return c.b.call("BitwiseNot", c.value("self"))


def _bitwise(logical: str, bitwise: str) -> Translate:
    def translate(c: Call) -> Value:
        op = logical if c.dtype == torch.bool else bitwise
        return c.b.call(op, c.value("self", c.dtype), c.value("other", c.dtype))

    return translate


translates(aten.bitwise_and.Tensor, aten.bitwise_and.Scalar, aten.__and__.Tensor)(
    _bitwise("And", "BitwiseAnd")
)
translates(aten.bitwise_or.Tensor, aten.bitwise_or.Scalar, aten.__or__.Tensor)(
    _bitwise("Or", "BitwiseOr")
)
translates(aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar, aten.__xor__.Tensor)(
    _bitwise("Xor", "BitwiseXor")
)


@translates(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(c: Call) -> Value:
    """``self`` where the condition holds, else ``other``."""
    return c.b.call(
        "Where",
        c.value("condition", torch.bool),
        c.value("self", c.dtype),
        c.value("other", c.dtype),
        dtype=c.dtype,
    )


@translates(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(c: Call) -> Value:
    """``value`` where the mask holds, else ``self``."""
    filled = c.value("value", c.dtype)
    return c.b.call("Where", c.value("mask"), filled, c.value("self"), dtype=c.dtype)


@translates(aten.clamp.default, aten.clamp.Tensor)
def clamp(c: Call) -> Value:
    """``self`` between ``min`` and ``max``."""
    value = c.value("self", c.dtype)
    for bound, op in (("min", "Max"), ("max", "Min")):
        if c.given(bound):
            value = c.b.call(op, value, c.value(bound, c.dtype))
    return value


@translates(aten.clamp_min.default, aten.clamp_min.Tensor)
def clamp_min(c: Call) -> Value:
    """``self``, at least ``min``."""
    return c.b.call("Max", c.value("self", c.dtype), c.value("min", c.dtype))


@translates(aten.clamp_max.default, aten.clamp_max.Tensor)
def clamp_max(c: Call) -> Value:
    """``self``, at most ``max``."""
    return c.b.call("Min", c.value("self", c.dtype), c.value("max", c.dtype))


@translates(aten.silu.default)
def silu(c: Call) -> Value:
    """``self · sigmoid(self)``."""
    return swish(c, c.value("self"))


def swish(c: Call, value: Value) -> Value:
    """``value · sigmoid(value)``."""
    return c.b.call("Mul", value, c.b.call("Sigmoid", value))


@translates(aten.gelu.default)
def gelu(c: Call) -> Value:
    """The Gaussian error linear unit, exact or by tanh."""
    return gaussian_unit(c, c.value("self"), c.constant("approximate"))


def gaussian_unit(c: Call, x: Value, approximate: str) -> Value:
    """Gelu of a value: an operator from opset 20, else in the form that runtimes recognise."""
    if c.b.opset >= 20:
        return c.b.call("Gelu", x, approximate=approximate)
    half = c.b.constant(0.5, x.dtype, "half")
    one = c.b.constant(1.0, x.dtype, "one")
    if approximate == "tanh":
        cube = c.b.call("Pow", x, c.b.constant(3.0, x.dtype, "three"))
        inner = c.b.call("Add", x, c.b.call("Mul", cube, c.b.constant(0.044715, x.dtype)))
        inner = c.b.call("Mul", inner, c.b.constant(math.sqrt(2 / math.pi), x.dtype))
        gate = c.b.call("Add", c.b.call("Tanh", inner), one)
        return c.b.call("Mul", c.b.call("Mul", x, gate), half)
    inner = c.b.call("Div", x, c.b.constant(math.sqrt(2), x.dtype))
    gate = c.b.call("Add", c.b.call("Erf", inner), one)
    return c.b.call("Mul", c.b.call("Mul", x, gate), half)


@translates(aten.softplus.default)
def softplus(c: Call) -> Value:
    """``log(1 + e^(beta · self)) / beta``, and ``self`` itself above a threshold."""
    x, beta = c.value("self"), c.constant("beta") or 1
    scaled = x if beta == 1 else c.b.call("Mul", x, c.number(beta))
    soft = c.b.call("Softplus", scaled)
    soft = soft if beta == 1 else c.b.call("Div", soft, c.number(beta))
    threshold = c.constant("threshold")
    above = c.b.call(
        "Greater", scaled, c.number(20 if threshold is None else threshold), dtype=torch.bool
    )
    return c.b.call("Where", above, x, soft, dtype=c.dtype)


@translates(aten.log_sigmoid.default, aten.log_sigmoid_forward.default)
def log_sigmoid(c: Call) -> Value:
    """``-log(1 + e^(-self))``."""
    result = c.b.call("Neg", c.b.call("Softplus", c.b.call("Neg", c.value("self"))))
    # The second result of the decomposed form is for a backward pass only.
    return result if isinstance(c.result, torch.Tensor) else (result, result)  # pyright: ignore


@translates(aten.leaky_relu.default)
def leaky_relu(c: Call) -> Value:
    """``self``, or a fraction of it where it is negative."""
    return c.b.call("LeakyRelu", c.value("self"), alpha=float(c.constant("negative_slope")))


@translates(aten.elu.default)
def elu(c: Call) -> Value:
    """The exponential linear unit, scaled (``selu``, ``celu``)."""
    b, x = c.b, c.value("self")
    alpha, scale, input_scale = (float(c.constant(n)) for n in ("alpha", "scale", "input_scale"))
    if scale == input_scale == 1:
        return b.call("Elu", x, alpha=alpha)
    # ONNX's Elu of the scaled input is right where that is negative.
    below = b.call("Elu", b.call("Mul", x, c.number(input_scale)), alpha=alpha)
    is_below = b.call("Less", x, c.number(0), dtype=torch.bool)
    return b.call("Mul", b.call("Where", is_below, below, x, dtype=c.dtype), c.number(scale))


@translates(aten.hardtanh.default)
def hard_tanh(c: Call) -> Value:
    """``self`` between two numbers."""
    low, high = c.number(c.constant("min_val")), c.number(c.constant("max_val"))
    return c.b.call("Min", c.b.call("Max", c.value("self"), low), high)


@translates(aten.hardsigmoid.default)
def hard_sigmoid(c: Call) -> Value:
    """``clip(self / 6 + 1/2, 0, 1)``."""
    return c.b.call("HardSigmoid", c.value("self"), alpha=1 / 6, beta=0.5)


@translates(aten.relu6.default)
def relu6(c: Call) -> Value:
    """``self`` between 0 and 6."""
    return c.b.call("Min", c.b.call("Relu", c.value("self")), c.number(6))
