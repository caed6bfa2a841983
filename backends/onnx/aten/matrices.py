"""Linear layers and matrix products.

Weights of linear layers become constants of shape [in, out], which is how runtimes read them
fastest for a few rows; they are transposed while the file is written.
"""

from __future__ import annotations

import torch

from fxgraft.backends.onnx.assembler import ONE, Dims
from fxgraft.backends.onnx.builder import Body, Value
from fxgraft.backends.onnx.call import Call, translates

aten = torch.ops.aten


@translates(aten.linear.default)
def linear(c: Call) -> Value:
    """``input · weightᵀ + bias``."""
    weight = (
        c.b.transpose(c.value("weight"), c.dims("weight"), (1, 0))
        if len(c.dims("weight")) == 2
        else c.value("weight")
    )
    result = c.b.call("MatMul", c.value("input"), weight)
    return c.b.call("Add", result, c.value("bias")) if c.given("bias") else result


@translates(aten.matmul.default)
def matmul(c: Call) -> Value:
    """A matrix product; dimensions before the last two are broadcast."""
    return c.b.call("MatMul", c.value("self"), c.value("other"))


@translates(aten.mm.default, aten.bmm.default)
def batched(c: Call) -> Value:
    """A matrix product."""
    return c.b.call("MatMul", c.value("self"), c.value("mat2"))


@translates(aten.mv.default)
def matrix_vector(c: Call) -> Value:
    """A matrix times a vector."""
    return c.b.call("MatMul", c.value("self"), c.value("vec"))


@translates(aten.addmm.default)
def add_product(c: Call) -> Value:
    """``beta · self + alpha · mat1 · mat2``."""
    return _add(c, c.b.call("MatMul", c.value("mat1"), c.value("mat2")))


@translates(aten.baddbmm.default)
def add_batched_product(c: Call) -> Value:
    """``beta · self + alpha · batch1 · batch2``."""
    return _add(c, c.b.call("MatMul", c.value("batch1"), c.value("batch2")))


def _add(c: Call, product: Value) -> Value:
    if c.constant("alpha") != 1:
        product = c.b.call("Mul", product, c.number(c.constant("alpha")))
    if c.constant("beta") == 0:
        return product
    term = c.value("self")
    if c.constant("beta") != 1:
        term = c.b.call("Mul", term, c.number(c.constant("beta")))
    return c.b.call("Add", product, term)


@translates(aten.einsum.default)
def einsum(c: Call) -> Value:
    """A sum of products, by a formula."""
    return c.b.call("Einsum", *c.values("tensors"), equation=str(c.constant("equation")))


@translates("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")
def grouped_product(c: Call) -> Value:
    """Each row times the matrix of its group; groups are runs of rows that end at ``offs``.

    For one token per row of the batch each row's matrix is read by index, otherwise a Loop goes
    over the groups.
    """
    left, right = ("input", "weight") if "weight" in c.arguments else ("self", "mat2")
    if len(c.dims(left)) != 2 or len(c.dims(right)) != 3:
        raise c.error("a grouped product of other than rows and one matrix per group")
    rows, matrices = c.value(left, c.dtype), c.value(right, c.dtype)
    ends = c.value("offs", torch.int64)
    if c.context.is_decode:
        return _by_row(c, rows, c.dims(left), matrices, ends)
    return _by_group(c, rows, matrices, ends, int(c.dims(right)[0]), int(c.dims(right)[2]))


def _by_row(c: Call, rows: Value, shape: Dims, matrices: Value, ends: Value) -> Value:
    b = c.b
    place = b.unsqueeze(b.range(0, shape[0]), shape[:1], 1)
    passed = b.call("LessOrEqual", ends, place, dtype=torch.bool)
    group = b.call("ReduceSum", b.cast(passed, torch.int64), b.integers(1), keepdims=0)
    chosen = b.call("Gather", matrices, group, axis=0)
    return b.squeeze(
        b.call("MatMul", b.unsqueeze(rows, shape, 1), chosen), [shape[0], ONE, c.out_dims[1]], 1
    )


def _by_group(c: Call, rows: Value, matrices: Value, ends: Value, count: int, width: int) -> Value:
    b = c.b
    starts = b.call("Concat", b.integers(0), b.slice(ends, 0, 0, count - 1), axis=0)
    inner = b.body()
    place, go_on = (inner.input(t, shape=()) for t in (torch.int64, torch.bool))
    before = inner.input(c.dtype, shape=("rows", width))
    borders = [
        inner.call("Unsqueeze", inner.call("Gather", border, place, axis=0), inner.integers(0))
        for border in (starts, ends)
    ]
    group = inner.call("Slice", rows, *borders, inner.integers(0))
    product = inner.call("MatMul", group, inner.call("Gather", matrices, place, axis=0))
    outputs = inner.outputs((go_on, inner.call("Concat", before, product, axis=0)))
    body = Body(inner, (place, go_on, before), outputs)
    nothing = b.constant(torch.zeros(0, width, dtype=c.dtype), name="nothing")
    trips, true = b.constant(count, torch.int64, "groups"), b.constant(True, torch.bool, "true")
    return b.call("Loop", trips, true, nothing, dtype=c.dtype, body=body)
