"""Convolutions, pooling and resampling of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, translates

aten = torch.ops.aten


@translates(
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.convolution.default,
)  # fmt: skip
def convolution(c: Call) -> Value:
    """A convolution, or its transpose."""
    rank = len(c.dims("weight")) - 2
    stride, dilation = (_per_axis(c.constant(name), rank) for name in ("stride", "dilation"))
    padding, groups = c.constant("padding"), int(c.constant("groups"))
    inputs = (c.value("input"), c.value("weight"), c.optional("bias"))
    common: dict[str, Any] = {"strides": stride, "dilations": dilation, "group": groups}
    if isinstance(padding, str):
        auto = "VALID" if padding == "valid" else "SAME_UPPER"
        return c.b.call("Conv", *inputs, auto_pad=auto, **common)
    pads = _per_axis(padding, rank) * 2
    if c.arguments.get("transposed"):
        extra = _per_axis(c.constant("output_padding"), rank)
        return c.b.call("ConvTranspose", *inputs, pads=pads, output_padding=extra, **common)
    return c.b.call("Conv", *inputs, pads=pads, **common)


@translates(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed_convolution(c: Call) -> Value:
    """The transpose of a convolution."""
    rank = len(c.dims("weight")) - 2
    names = ("stride", "dilation", "padding", "output_padding")
    stride, dilation, padding, extra = (_per_axis(c.constant(name), rank) for name in names)
    return c.b.call(
        "ConvTranspose", c.value("input"), c.value("weight"), c.optional("bias"),
        strides=stride, dilations=dilation, pads=padding * 2, output_padding=extra,
        group=int(c.constant("groups")),
    )  # fmt: skip


def _per_axis(given: int | Sequence[int], rank: int) -> tuple[int, ...]:
    numbers = (given,) if isinstance(given, int) else tuple(int(number) for number in given)
    return numbers * rank if len(numbers) == 1 else numbers


@translates(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def max_pool(c: Call) -> Value:
    """The largest element of each window."""
    return _max_pool(c)


def _max_pool(c: Call) -> Value:
    rank = len(c.out_dims) - 2
    kernel = _per_axis(c.constant("kernel_size"), rank)
    return c.b.call(
        "MaxPool", c.value("self"), kernel_shape=kernel,
        strides=_per_axis(c.constant("stride") or kernel, rank),
        pads=_per_axis(c.constant("padding"), rank) * 2,
        dilations=_per_axis(c.constant("dilation"), rank),
        ceil_mode=int(bool(c.constant("ceil_mode"))),
    )  # fmt: skip


@translates(aten.max_pool2d_with_indices.default)
def max_pool_with_places(c: Call) -> tuple[Value, Value]:
    """The largest element of each window; the places are for a backward pass only."""
    value = _max_pool(c)
    return value, value


@translates(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def average_pool(c: Call) -> Value:
    """The mean of each window."""
    if c.arguments.get("divisor_override"):
        raise c.error("an average pooling with a divisor of its own")
    rank = len(c.out_dims) - 2
    kernel = _per_axis(c.constant("kernel_size"), rank)
    return c.b.call(
        "AveragePool", c.value("self"), kernel_shape=kernel,
        strides=_per_axis(c.constant("stride") or kernel, rank),
        pads=_per_axis(c.constant("padding"), rank) * 2,
        ceil_mode=int(bool(c.constant("ceil_mode"))),
        count_include_pad=int(bool(c.constant("count_include_pad"))),
    )  # fmt: skip


@translates(
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
)  # fmt: skip
def adaptive_average_pool(c: Call) -> Value:
    """Means of windows, as many as asked for; one is the mean of everything."""
    wanted = [int(size) for size in c.constant("output_size")]
    if all(size == 1 for size in wanted):
        return c.b.call("GlobalAveragePool", c.value("self"))
    given = c.dims("self")[-len(wanted) :]
    if any(
        not size.is_Integer or int(size) % goal for size, goal in zip(given, wanted, strict=True)
    ):
        raise c.error(f"windows of unequal size: {given} to {wanted}")
    kernel = tuple(int(size) // goal for size, goal in zip(given, wanted, strict=True))
    return c.b.call("AveragePool", c.value("self"), kernel_shape=kernel, strides=kernel)


@translates(
    aten.upsample_nearest2d.vec, aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.default, aten.upsample_nearest1d.default,
)  # fmt: skip
def nearest(c: Call) -> Value:
    """Resample to the nearest pixel."""
    return _resize(c, mode="nearest", coordinate_transformation_mode="asymmetric",
                   nearest_mode="floor")  # fmt: skip


@translates(
    aten.upsample_bilinear2d.vec, aten.upsample_linear1d.vec,
    aten.upsample_bilinear2d.default, aten.upsample_linear1d.default,
)  # fmt: skip
def linear(c: Call) -> Value:
    """Resample, weighing neighbours by their distance."""
    return _resize(c, mode="linear", coordinate_transformation_mode=_coordinates(c))


@translates(aten.upsample_bicubic2d.vec, aten.upsample_bicubic2d.default)
def cubic(c: Call) -> Value:
    """Resample by cubic polynomials."""
    return _resize(c, mode="cubic", coordinate_transformation_mode=_coordinates(c),
                   cubic_coeff_a=-0.75)  # fmt: skip


def _coordinates(c: Call) -> str:
    return "align_corners" if c.constant("align_corners") else "half_pixel"


def _resize(c: Call, **attributes: Any) -> Value:
    image = c.value("input" if "input" in c.arguments else "self")
    return c.b.call("Resize", image, None, None, c.b.vector(c.out_dims), **attributes)
