"""Views, joins, repeats, casts."""

from __future__ import annotations

from collections.abc import Sequence

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch

from fxgraft.backends.onnx.assembler import ONE, ZERO, product
from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, translates

aten = torch.ops.aten
_END = torch.iinfo(torch.int64).max


@translates(
    aten.alias.default, aten.contiguous.default, aten.clone.default, aten.detach.default,
    aten.lift_fresh_copy.default,
)  # fmt: skip
def same(c: Call) -> Value:
    """The tensor itself."""
    return c.value("self")


@translates(
    aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default,
    aten.type_as.default,
)  # fmt: skip
def cast(c: Call) -> Value:
    """Another element type."""
    return c.value("self", c.dtype)


@translates(aten.dropout.default)
def dropout(c: Call) -> Value:
    """The tensor itself: nothing is dropped outside training."""
    if c.constant("train"):
        raise c.error("it drops elements at random", "capture the model in evaluation mode")
    return c.value("input")


@translates(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.view_as.default,
    aten.reshape_as.default, aten.flatten.using_ints, aten.unflatten.int,
)  # fmt: skip
def view(c: Call) -> Value:
    """The same elements in other dimensions."""
    return c.b.reshape(c.value("self"), c.dims("self"), c.out_dims)


@translates(aten.unsqueeze.default)
def unsqueeze(c: Call) -> Value:
    """One more dimension, of size 1."""
    axis = int(c.constant("dim")) % (c.fake("self").dim() + 1)
    return c.b.unsqueeze(c.value("self"), c.dims("self"), axis)


@translates(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(c: Call) -> Value:
    """Without dimensions of size 1."""
    source = c.dims("self")
    wanted = c.constant("dim")
    axes = [wanted] if isinstance(wanted, int) else range(len(source)) if wanted is None else wanted
    gone = [axis % len(source) for axis in axes if source[axis] == 1] if source else []
    return c.b.squeeze(c.value("self"), source, *gone)


@translates(aten.transpose.int, aten.swapaxes.default)
def transpose(c: Call) -> Value:
    """Two dimensions exchanged."""
    source = c.dims("self")
    names = ("dim0", "dim1") if "dim0" in c.arguments else ("axis0", "axis1")
    first, second = (int(c.constant(name)) % max(len(source), 1) for name in names)
    order = list(range(len(source)))
    if source:
        order[first], order[second] = second, first
    return c.b.transpose(c.value("self"), source, order)


@translates(aten.permute.default)
def permute(c: Call) -> Value:
    """The dimensions in another order."""
    return c.b.transpose(c.value("self"), c.dims("self"), c.constant("dims"))


@translates(aten.t.default, aten.numpy_T.default, aten.mT.default)
def matrix_transpose(c: Call) -> Value:
    """Dimensions in reverse, of ``mT`` the last two."""
    source = c.dims("self")
    order = list(range(len(source)))
    last = 2 if c.node.target is aten.mT.default else len(order)
    order[-last:] = reversed(order[-last:])
    return c.b.transpose(c.value("self"), source, order)


@translates(aten.movedim.int)
def move_dimension(c: Call) -> Value:
    """One dimension moved elsewhere."""
    source = c.dims("self")
    order = list(range(len(source)))
    order.insert(c.axis("destination", "self"), order.pop(c.axis("source", "self")))
    return c.b.transpose(c.value("self"), source, order)


@translates(aten.expand.default, aten.expand_as.default)
def expand(c: Call) -> Value:
    """Broadcast."""
    return c.b.expand(c.value("self"), c.dims("self"), c.out_dims)


@translates(aten.broadcast_tensors.default)
def broadcast_tensors(c: Call) -> Sequence[Value]:
    """All tensors broadcast to one shape."""
    items = zip(c.arguments["tensors"], c.values("tensors"), strict=True)
    return [c.b.expand(value, c.dims_of(item), c.out_dims) for item, value in items]


@translates(aten.repeat.default)
def repeat(c: Call) -> Value:
    """The tensor several times along each dimension."""
    repeats, source = c.sizes("repeats"), c.dims("self")
    wide = [*[ONE] * (len(repeats) - len(source)), *source]
    value = c.b.reshape(c.value("self"), source, wide)
    return c.b.call("Tile", value, c.b.vector(repeats))


@translates(aten.repeat_interleave.self_int)
def repeat_interleave(c: Call) -> Value:
    """Each entry along a dimension several times in a row."""
    source, value = c.dims("self"), c.value("self")
    if not c.given("dim"):
        value, source = c.b.reshape(value, source, [product(source)]), (product(source),)
    axis = int(c.constant("dim") or 0) % len(source)
    repeats = c.size("repeats")
    wide = [*source[: axis + 1], repeats, *source[axis + 1 :]]
    value = c.b.expand(c.b.unsqueeze(value, source, axis + 1), (), wide)
    return c.b.reshape(value, wide, c.out_dims)


@translates(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(c: Call) -> Value:
    """Tensors joined along a dimension."""
    # PyTorch ignores tensors of shape [0], whatever the others' rank.
    items = [
        c.as_value(item, c.dtype)
        for item in c.arguments["tensors"]
        if len(c.dims_of(item)) == len(c.out_dims)
    ]
    if len(items) == 1:
        return items[0]
    return c.b.call("Concat", *items, axis=int(c.constant("dim")) % len(c.out_dims))


@translates(aten.stack.default)
def stack(c: Call) -> Value:
    """Tensors joined along a new dimension."""
    axis = int(c.constant("dim")) % len(c.out_dims)
    source = [*c.out_dims[:axis], *c.out_dims[axis + 1 :]]
    items = [c.b.unsqueeze(value, source, axis) for value in c.values("tensors", c.dtype)]
    return items[0] if len(items) == 1 else c.b.call("Concat", *items, axis=axis)


@translates(
    aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default,
    aten.tensor_split.sections,
)  # fmt: skip
def split(c: Call) -> Sequence[Value]:
    """Consecutive pieces along a dimension."""
    axis = c.axis("dim", "self")
    lengths = [c.result_dims(place)[axis] for place in range(len(c.result))]
    if len(lengths) == 1:
        return [c.value("self")]
    return c.b.call_many(
        "Split", c.value("self"), c.b.vector(lengths), dtypes=[c.dtype] * len(lengths), axis=axis
    )


@translates(aten.unbind.int)
def unbind(c: Call) -> Sequence[Value]:
    """The entries along a dimension."""
    source, axis = c.dims("self"), c.axis("dim", "self")
    ones = [*source[:axis], ONE, *source[axis + 1 :]]
    count = len(c.result)
    if count == 1:
        return [c.b.squeeze(c.value("self"), ones, axis)]
    pieces = c.b.call_many("Split", c.value("self"), c.b.integers(*[1] * count),
                           dtypes=[c.dtype] * count, axis=axis)  # fmt: skip
    return [c.b.squeeze(piece, ones, axis) for piece in pieces]


@translates(aten.slice.Tensor)
def slice_(c: Call) -> Value:
    """A range of a dimension."""
    if c.out_dims == c.dims("self"):
        return c.value("self")
    start, end = c.size("start"), c.size("end", default=_END)
    step = int(c.constant("step") or 1)
    return c.b.slice(c.value("self"), c.axis("dim", "self"), start, end, step)


@translates(aten.narrow.default)
def narrow(c: Call) -> Value:
    """``length`` entries of a dimension."""
    start = c.size("start")
    end = start + c.size("length")
    return c.b.slice(c.value("self"), c.axis("dim", "self"), start, end)


@translates(aten.select.int)
def select(c: Call) -> Value:
    """One entry of a dimension."""
    return c.b.call(
        "Gather", c.value("self"), c.b.scalar(c.size("index")), axis=c.axis("dim", "self")
    )


@translates(aten.flip.default)
def flip(c: Call) -> Value:
    """Dimensions in reverse order."""
    axes = [axis % len(c.out_dims) for axis in c.constant("dims")]
    ends = [torch.iinfo(torch.int64).min] * len(axes)
    starts, steps = [-1] * len(axes), [-1] * len(axes)
    vectors = [c.b.integers(*numbers) for numbers in (starts, ends, axes, steps)]
    return c.b.call("Slice", c.value("self"), *vectors)


@translates(aten.roll.default)
def roll(c: Call) -> Value:
    """Entries moved along dimensions, those that fall off coming in again."""
    value = c.value("self")
    for shift, axis in zip(c.constant("shifts"), c.constant("dims"), strict=True):
        parts = (c.b.slice(value, axis, -shift, _END), c.b.slice(value, axis, 0, -shift))
        value = c.b.call("Concat", *parts, axis=axis % len(c.out_dims))
    return value


@translates(aten.unfold.default)
def unfold(c: Call) -> Value:
    """Windows of a dimension, their entries in a new last one."""
    axis = c.axis("dimension", "self")
    size, step = int(c.constant("size")), int(c.constant("step"))
    windows = c.out_dims[axis]
    first = c.b.call("Mul", c.b.range(0, windows), c.b.constant(step, torch.int64))
    first = c.b.unsqueeze(first, (windows,), 1)
    places = c.b.call("Add", first, c.b.range(0, size))
    value = c.b.call("Gather", c.value("self"), places, axis=axis)
    gathered = [*c.out_dims[: axis + 1], sympy.Integer(size), *c.out_dims[axis + 1 : -1]]
    order = [*range(axis + 1), *range(axis + 2, len(gathered)), axis + 1]
    return c.b.transpose(value, gathered, order)


@translates(aten.constant_pad_nd.default)
def constant_pad(c: Call) -> Value:
    """A number around the tensor."""
    return _pad(c, "constant", c.constant("value") or 0)


@translates(aten.pad.default)
def pad(c: Call) -> Value:
    """Padding around the tensor, of several kinds."""
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    return _pad(c, modes[c.constant("mode")], c.constant("value") or 0)


@translates(aten.reflection_pad1d.default, aten.reflection_pad2d.default)
def reflection_pad(c: Call) -> Value:
    """Padding that mirrors the tensor."""
    return _pad(c, "reflect", 0, "padding")


@translates(aten.replication_pad1d.default, aten.replication_pad2d.default)
def replication_pad(c: Call) -> Value:
    """Padding that repeats the border."""
    return _pad(c, "edge", 0, "padding")


def _pad(c: Call, mode: str, number: float, name: str = "pad") -> Value:
    """PyTorch lists pairs from the last dimension back, ONNX all starts and then all ends."""
    given, rank = c.sizes(name), len(c.out_dims)
    before, after = [ZERO] * rank, [ZERO] * rank
    for place in range(len(given) // 2):
        before[rank - 1 - place], after[rank - 1 - place] = given[2 * place : 2 * place + 2]
    # onnxruntime pads no booleans.
    dtype = torch.uint8 if c.dtype == torch.bool else c.dtype
    filling = c.number(number, dtype) if mode == "constant" else None
    value = c.value("self", dtype)
    return c.b.cast(
        c.b.call("Pad", value, c.b.vector([*before, *after]), filling, mode=mode), c.dtype
    )


@translates(aten.slice_scatter.default)
def slice_scatter(c: Call) -> Value:
    """``self`` with a range of a dimension replaced by ``src``."""
    axis = c.axis("dim", "self")
    length = c.dims("self")[axis]
    step = int(c.constant("step") or 1)
    places = c.b.range(0, length)
    start, end = c.size("start"), c.size("end", default=_END)
    chosen = c.b.slice(places, 0, start, end, step)
    count = c.dims("src")[axis]
    shape = [ONE] * len(c.out_dims)
    shape[axis] = count
    indices = c.b.expand(c.b.reshape(chosen, (count,), shape), shape, c.dims("src"))
    return c.b.call("ScatterElements", c.value("self"), indices, c.value("src", c.dtype), axis=axis)


@translates(aten.select_scatter.default)
def select_scatter(c: Call) -> Value:
    """``self`` with one entry of a dimension replaced by ``src``."""
    axis = c.axis("dim", "self")
    index = c.size("index")
    shape = [*c.out_dims[:axis], ONE, *c.out_dims[axis + 1 :]]
    source = c.b.unsqueeze(c.value("src", c.dtype), c.dims("src"), axis)
    indices = c.b.expand(c.b.scalar(index), (), shape)
    return c.b.call("ScatterElements", c.value("self"), indices, source, axis=axis)
