"""Reading and writing elements by index."""

from __future__ import annotations

from collections.abc import Sequence

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch.fx import Node

from fxgraft.backends.onnx.assembler import ONE, Dims
from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call, Translate, translates
from fxgraft.kernels.spec import dims

aten = torch.ops.aten


@translates(aten.embedding.default)
def embedding(c: Call) -> Value:
    """Rows of a table."""
    return c.b.call("Gather", c.value("weight"), c.value("indices"), axis=0)


@translates(aten.index_select.default)
def index_select(c: Call) -> Value:
    """Entries along a dimension."""
    return c.b.call("Gather", c.value("self"), c.value("index"), axis=c.axis("dim", "self"))


@translates(aten.gather.default)
def gather(c: Call) -> Value:
    """Elements along a dimension, chosen for each place."""
    axis = c.axis("dim", "self")
    return c.b.call("GatherElements", c.value("self"), c.value("index", torch.int64), axis=axis)


@translates(aten.item.default)
def item(c: Call) -> Value:
    """The number in a tensor of one element."""
    return c.value("self")


@translates(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(c: Call) -> Value:
    """Elements chosen by one index tensor or several that are broadcast together.

    1. A mask over the leading dimensions chooses what it keeps.
    2. One index tensor is a ``Gather`` along its dimension.
    3. Several in a row are a ``GatherND`` with their dimensions in front.
    """
    places = _places(c)
    indices = [c.arguments["indices"][place] for place in places]
    if _is_mask(indices[0]):
        return _masked(c, indices)
    if len(places) == 1:
        found = c.as_value(indices[0], torch.int64)
        return c.b.call("Gather", c.value("self"), found, axis=places[0])
    if places != list(range(places[0], places[0] + len(places))):
        raise c.error("index tensors that are not next to each other")
    source = c.dims("self")
    order = [*places, *(axis for axis in range(len(source)) if axis not in places)]
    value = c.b.transpose(c.value("self"), source, order)
    shape = _broadcast(c, indices)
    value = c.b.call("GatherND", value, _stacked(c, indices, shape))
    return _move_back(c, value, [*shape, *(source[axis] for axis in order[len(places) :])],
                      len(shape), places[0])  # fmt: skip


def _move_back(c: Call, value: Value, given: Dims, front: int, place: int) -> Value:
    """The chosen dimensions, in front, belong where the first index tensor was."""
    rest = list(range(front, len(given)))
    order = [*rest[:place], *range(front), *rest[place:]]
    return c.b.transpose(value, given, order)


def _places(c: Call) -> list[int]:
    given: Sequence[Node | None] = c.arguments["indices"]
    return [place for place, found in enumerate(given) if found is not None]


def _is_mask(node: Node) -> bool:
    return node.meta["val"].dtype in (torch.bool, torch.uint8)


def _masked(c: Call, indices: Sequence[Node]) -> Value:
    if len(indices) > 1 or c.arguments["indices"][0] is None:
        raise c.error("a mask together with other indices")
    return c.b.call("GatherND", c.value("self"), _mask_places(c, indices[0]))


def _mask_places(c: Call, mask: Node) -> Value:
    """The places where a mask holds, int64 [N, R]."""
    found = c.b.call("NonZero", c.as_value(mask, torch.bool), dtype=torch.int64)
    return c.b.call("Transpose", found, perm=(1, 0))


def _broadcast(c: Call, indices: Sequence[Node]) -> list[sympy.Expr]:
    """The common shape of index tensors."""
    shapes = [dims(found) for found in indices]
    rank = max(len(shape) for shape in shapes)
    padded = [[ONE] * (rank - len(shape)) + list(shape) for shape in shapes]
    return [next((size for size in sizes if size != 1), ONE) for sizes in zip(*padded, strict=True)]


def _stacked(c: Call, indices: Sequence[Node], shape: Dims) -> Value:
    """Index tensors side by side: int64 [..., number of them]."""
    columns: list[Value] = []
    for found in indices:
        whole = c.b.expand(c.as_value(found, torch.int64), dims(found), shape)
        columns.append(c.b.unsqueeze(whole, shape, len(shape)))
    return columns[0] if len(columns) == 1 else c.b.call("Concat", *columns, axis=len(shape))


@translates(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(c: Call) -> Value:
    """``self`` with ``values`` at the given indices, added to what is there or in its place."""
    places = _places(c)
    indices = [c.arguments["indices"][place] for place in places]
    value = c.value("self")
    if _is_mask(indices[0]):
        return _masked_put(c, indices, value)
    if places != list(range(places[0], places[-1] + 1)):
        raise c.error("index tensors that are not next to each other")
    source, shape = c.dims("self"), _broadcast(c, indices)
    order = [*places, *(axis for axis in range(len(source)) if axis not in places)]
    # What is written has the indexed dimensions where the first of them was.
    written = [*source[: places[0]], *shape, *source[places[-1] + 1 :]]
    updates = c.b.expand(c.value("values", c.dtype), c.dims("values"), written)
    middle = list(range(places[0], places[0] + len(shape)))
    rest = [axis for axis in range(len(written)) if axis not in middle]
    updates = c.b.transpose(updates, written, [*middle, *rest])
    how = "add" if c.constant("accumulate") else None
    front = [source[axis] for axis in order]
    value = c.b.transpose(value, source, order)
    result = c.b.call("ScatterND", value, _stacked(c, indices, shape), updates, reduction=how)
    return c.b.transpose(result, front, [order.index(axis) for axis in range(len(source))])


def _masked_put(c: Call, indices: Sequence[Node], value: Value) -> Value:
    mask = indices[0]
    if len(indices) > 1 or c.constant("accumulate") or c.arguments["indices"][0] is None:
        raise c.error("a mask together with other indices")
    if len(c.dims("values")) == 0:
        rank = len(c.dims("self"))
        wide = (
            c.b.unsqueeze(c.as_value(mask, torch.bool), dims(mask), *range(len(dims(mask)), rank))
            if rank > len(dims(mask))
            else c.as_value(mask, torch.bool)
        )
        return c.b.call("Where", wide, c.value("values", c.dtype), value, dtype=c.dtype)
    return c.b.call("ScatterND", value, _mask_places(c, mask), c.value("values", c.dtype))


def _scatter(reduction: str | None, source: str) -> Translate:
    def translate(c: Call) -> Value:
        index_dims = c.dims("index")
        if source == "value":
            updates = c.b.full(index_dims, c.constant("value"), c.dtype)
        else:
            updates = c.value("src", c.dtype)
            if c.dims("src") != index_dims:
                updates = c.b.call("Slice", updates, c.b.integers(*[0] * len(index_dims)),
                                   c.b.vector(index_dims))  # fmt: skip
        how = reduction or _REDUCTIONS.get(str(c.arguments.get("reduce")))
        return c.b.call(
            "ScatterElements", c.value("self"), c.value("index", torch.int64), updates,
            axis=c.axis("dim", "self"), reduction=how,
        )  # fmt: skip

    return translate


_REDUCTIONS = {"add": "add", "multiply": "mul", "sum": "add", "prod": "mul",
               "amax": "max", "amin": "min"}  # fmt: skip
translates(aten.scatter.value)(_scatter(None, "value"))
translates(aten.scatter.src, aten.scatter.reduce)(_scatter(None, "src"))
translates(aten.scatter_add.default)(_scatter("add", "src"))


@translates(aten.scatter_reduce.two)
def scatter_reduce(c: Call) -> Value:
    """``self`` combined with ``src`` at the given places."""
    if not c.constant("include_self") or c.constant("reduce") == "mean":
        raise c.error("a scatter that leaves out what was there, or averages")
    return _scatter(None, "src")(c)  # pyright: ignore[reportReturnType]


@translates(aten.index_add.default, aten.index_copy.default)
def index_add(c: Call) -> Value:
    """``self`` with the entries of ``source`` added along a dimension, or put in."""
    axis, source = c.axis("dim", "self"), c.dims("source")
    shape = [ONE] * len(source)
    shape[axis] = source[axis]
    index_value = c.b.reshape(c.value("index", torch.int64), c.dims("index"), shape)
    places = c.b.expand(index_value, shape, source)
    updates = c.value("source", c.dtype)
    if c.arguments.get("alpha", 1) != 1:
        updates = c.b.call("Mul", updates, c.number(c.constant("alpha")))
    how = "add" if c.node.target is aten.index_add.default else None
    return c.b.call("ScatterElements", c.value("self"), places, updates, axis=axis, reduction=how)


@translates(aten.nonzero.default)
def nonzero(c: Call) -> Value:
    """The places of elements that are not 0."""
    found = c.b.call("NonZero", c.value("self", torch.bool), dtype=torch.int64)
    return c.b.call("Transpose", found, perm=(1, 0))
