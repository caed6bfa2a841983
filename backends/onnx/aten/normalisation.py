"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch

from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, translates
from fxgraft.kernels.spec import dims

aten = torch.ops.aten


@translates(aten.layer_norm.default)
def layer_norm(c: Call) -> Value:
    """Zero mean and unit variance over the last dimensions, then weight and bias."""
    axis = -len(c.constant("normalized_shape"))
    eps = float(c.constant("eps"))
    return c.b.call("LayerNormalization", *_layer_norm_inputs(c), axis=axis, epsilon=eps)


@translates(aten.native_layer_norm.default)
def native_layer_norm(c: Call) -> Sequence[Value]:
    """The same, with mean and inverse deviation as results."""
    return c.b.call_many(
        "LayerNormalization", *_layer_norm_inputs(c), dtypes=[c.dtype] * 3,
        axis=-len(c.constant("normalized_shape")), epsilon=float(c.constant("eps")),
    )  # fmt: skip


def _layer_norm_inputs(c: Call) -> tuple[Value, Value, Value | None]:
    shape = [int(size) for size in c.constant("normalized_shape")]
    weight = c.optional("weight", c.dtype) or c.b.constant(torch.ones(shape, dtype=c.dtype))
    return c.value("input"), weight, c.optional("bias", c.dtype)


@translates(aten.rms_norm.default)
def rms_norm(c: Call) -> Value:
    """Unit mean square over the last dimension, then weight."""
    width = len(c.constant("normalized_shape"))
    if width != 1:
        raise c.error("a normalisation over several dimensions")
    eps = c.constant("eps")
    x = c.value("input")
    result = unit_mean_square(c, x, torch.finfo(c.dtype).eps if eps is None else eps)
    return c.b.call("Mul", result, c.value("weight", c.dtype)) if c.given("weight") else result


def unit_mean_square(c: Call, x: Value, eps: float) -> Value:
    """``x / √(mean(x²) + eps)`` over the last dimension, in the form that runtimes fuse."""
    b = c.b
    squares = b.call("Pow", x, b.constant(2.0, x.dtype, "two"))
    mean = b.call("ReduceMean", squares, b.integers(-1), keepdims=1)
    root = b.call("Sqrt", b.call("Add", mean, b.constant(float(eps), x.dtype, "epsilon")))
    return b.call("Div", x, root)


@translates(
    aten.batch_norm.default, aten.native_batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
)  # fmt: skip
def batch_norm(c: Call) -> Value:
    """Normalisation by statistics kept from training."""
    if c.arguments.get("training"):
        raise c.error("it uses the batch's own statistics", "capture in evaluation mode")
    shape = [dims(c.arguments["running_mean"])[0]]
    weight = c.optional("weight") or c.b.full(shape, 1, c.dtype)
    bias = c.optional("bias") or c.b.full(shape, 0, c.dtype)
    result = c.b.call(
        "BatchNormalization", c.value("input"), weight, bias,
        c.value("running_mean"), c.value("running_var"), epsilon=float(c.constant("eps")),
    )  # fmt: skip
    return result if isinstance(c.result, torch.Tensor) else (result, weight, bias)  # pyright: ignore


@translates(aten.group_norm.default)
def group_norm(c: Call) -> Value:
    """Normalisation over groups of channels."""
    return _group_norm(c, int(c.constant("num_groups")))


@translates(aten.native_group_norm.default)
def native_group_norm(c: Call) -> Sequence[Value]:
    """The same; its further results are for a backward pass only."""
    result = _group_norm(c, int(c.constant("group")))
    return [result] * 3


def _group_norm(c: Call, groups: int) -> Value:
    b, source = c.b, c.dims("input")
    grouped = b.call("Reshape", c.value("input"), b.integers(0, groups, -1))
    ones, noughts = (b.full([sympy.Integer(groups)], number, c.dtype) for number in (1, 0))
    eps = float(c.constant("eps"))
    normal = b.call("InstanceNormalization", grouped, ones, noughts, epsilon=eps)
    result = b.call("Reshape", normal, b.vector(source))
    for name, op in (("weight", "Mul"), ("bias", "Add")):
        if c.given(name):
            per_channel = b.unsqueeze(c.value(name), c.dims(name), *range(1, len(source) - 1))
            result = b.call(op, result, per_channel)
    return result


@translates(aten.instance_norm.default)
def instance_norm(c: Call) -> Value:
    """Normalisation of each channel of each sample."""
    if not c.constant("use_input_stats"):
        raise c.error("an instance normalisation by kept statistics")
    shape = [c.dims("input")[1]]
    weight = c.optional("weight") or c.b.full(shape, 1, c.dtype)
    bias = c.optional("bias") or c.b.full(shape, 0, c.dtype)
    return c.b.call(
        "InstanceNormalization", c.value("input"), weight, bias, epsilon=float(c.constant("eps"))
    )
