"""Sums, means, extremes and softmax along dimensions."""

from __future__ import annotations

import torch

from fxgraft.backends.onnx.assembler import product
from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, Translate, translates

aten = torch.ops.aten


def reduce(c: Call, op: str, value: Value, name: str = "dim") -> Value:
    """Apply a ``Reduce...`` operator along the dimensions that the call names, default all.

    Args:
        c: the call.
        op: the operator, for example ``"ReduceMean"``.
        value: what is reduced.
        name: of the argument with the dimensions.
    """
    axes = _axes(c, name)
    keep = int(bool(c.arguments.get("keepdim", False)))
    # Mean and extremes take their dimensions as an input since opset 18.
    return c.b.call(op, value, c.b.integers(*axes) if axes else None, keepdims=keep)


def _axes(c: Call, name: str) -> list[int]:
    wanted = c.constant(name) if name in c.arguments else None
    rank = len(c.dims("self"))
    if wanted is None or wanted == []:
        return list(range(rank))
    return [axis % max(rank, 1) for axis in ([wanted] if isinstance(wanted, int) else wanted)]


def _plain(op: str) -> Translate:
    def translate(c: Call) -> Value:
        return reduce(c, op, c.value("self", c.dtype))

    return translate


translates(aten.sum.dim_IntList, aten.sum.default)(_plain("ReduceSum"))
translates(aten.mean.dim, aten.mean.default)(_plain("ReduceMean"))
translates(aten.amax.default, aten.max.default)(_plain("ReduceMax"))
translates(aten.amin.default, aten.min.default)(_plain("ReduceMin"))
translates(aten.prod.dim_int, aten.prod.default)(_plain("ReduceProd"))


@translates(aten.logsumexp.default)
def log_sum_exp(c: Call) -> Value:
    """``log Σ e^self``; ONNX's own operator overflows."""
    value = c.value("self", c.dtype)
    axes = c.b.integers(*_axes(c, "dim"))
    largest = c.b.call("ReduceMax", value, axes, keepdims=1)
    total = c.b.call(
        "ReduceSum", c.b.call("Exp", c.b.call("Sub", value, largest)), axes, keepdims=1
    )
    result = c.b.call("Add", c.b.call("Log", total), largest)
    return result if c.constant("keepdim") else c.b.call("Squeeze", result, axes)


@translates(aten.any.default, aten.any.dim, aten.any.dims)
def any_(c: Call) -> Value:
    """Whether some element is not 0."""
    found = reduce(c, "ReduceMax", c.b.cast(c.value("self", torch.bool), torch.int32))
    return c.b.cast(found, torch.bool)


@translates(aten.all.default, aten.all.dim, aten.all.dims)
def all_(c: Call) -> Value:
    """Whether no element is 0."""
    found = reduce(c, "ReduceMin", c.b.cast(c.value("self", torch.bool), torch.int32))
    return c.b.cast(found, torch.bool)


@translates(aten.max.dim)
def max_dim(c: Call) -> tuple[Value, Value]:
    """The largest element along a dimension and its place."""
    return reduce(c, "ReduceMax", c.value("self")), _place(c, "ArgMax")


@translates(aten.min.dim)
def min_dim(c: Call) -> tuple[Value, Value]:
    """The smallest element along a dimension and its place."""
    return reduce(c, "ReduceMin", c.value("self")), _place(c, "ArgMin")


@translates(aten.argmax.default)
def argmax(c: Call) -> Value:
    """The place of the largest element."""
    return _place(c, "ArgMax")


@translates(aten.argmin.default)
def argmin(c: Call) -> Value:
    """The place of the smallest element."""
    return _place(c, "ArgMin")


def _place(c: Call, op: str) -> Value:
    keep = int(bool(c.constant("keepdim")))
    value, source = c.value("self"), c.dims("self")
    if not c.given("dim"):
        flat = c.b.call("Reshape", value, c.b.integers(-1))
        return c.b.call(op, flat, dtype=torch.int64, axis=0, keepdims=0)
    axis = int(c.constant("dim")) % max(len(source), 1)
    return c.b.call(op, value, dtype=torch.int64, axis=axis, keepdims=keep)


@translates(aten.softmax.int, aten._softmax.default)
def softmax(c: Call) -> Value:
    """``e^self``, scaled to a sum of 1 along a dimension."""
    return c.b.call("Softmax", c.value("self", c.dtype), axis=c.axis("dim", "self"))


@translates(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(c: Call) -> Value:
    """The logarithm of the softmax."""
    return c.b.call("LogSoftmax", c.value("self", c.dtype), axis=c.axis("dim", "self"))


@translates(aten.cumsum.default)
def cumsum(c: Call) -> Value:
    """Running sums along a dimension."""
    axis = c.b.constant(c.axis("dim", "self"), torch.int64, "axis")
    return c.b.call("CumSum", c.value("self", c.dtype), axis)


@translates(aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim)
def variance(c: Call) -> Value:
    """Variance, or its root the standard deviation."""
    axes, value = _axes(c, "dim"), c.value("self")
    numbers = c.b.integers(*axes)
    middle = c.b.call("ReduceMean", value, numbers, keepdims=1)
    apart = c.b.call("Sub", value, middle)
    total = reduce(c, "ReduceSum", c.b.call("Mul", apart, apart))
    count = product(c.dims("self")[axis] for axis in axes)
    divisor = c.b.cast(c.b.scalar(count - _correction(c)), c.dtype)
    result = c.b.call("Div", total, divisor)
    return c.b.call("Sqrt", result) if "std" in str(c.node.target) else result


def _correction(c: Call) -> int:
    if "unbiased" in c.arguments:
        return int(bool(c.constant("unbiased")))
    found = c.constant("correction")
    return 1 if found is None else int(found)


@translates(aten.linalg_vector_norm.default)
def vector_norm(c: Call) -> Value:
    """The length of vectors: the root of the sum of squares, or the sum of sizes."""
    order = c.constant("ord")
    if order not in (1, 2):
        raise c.error(f"a norm of order {order}")
    return reduce(c, "ReduceL1" if order == 1 else "ReduceL2", c.value("self", c.dtype))
