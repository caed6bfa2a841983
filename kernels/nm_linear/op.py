"""``fxgraft::nm_linear``: residual + activation(norm(x) Wᵀ + bias) with an N:M sparse weight W.

W [F, K] keeps at most N of every M inputs of a row and is stored packed, as
``fxgraft.kernels.nm_linear.packing.pack`` makes it and ``fxgraft.kernels.nm_linear.layout``
describes it: G = K / M groups in a row, V = gcd(G, 8) groups in a chunk. N is the number kept (for
Wanda and SparseGPT, the number pruned). Norm, activation and residual are those of
``fxgraft::fused_linear``, and only lowering adds them.

With ``ends`` there are E weights (experts), and each row of x meets one of them: rows up to
``ends[0]`` the first, from there to ``ends[1]`` the second; rows from the last end on give 0.
Experts without rows are not unpacked.

Args:
    x: [..., K].
    values: [G / V, N, F, V], x's dtype; [E, G / V, N, F, V] with ``ends``.
    indices: [G / V, W, F], integers: which columns are kept, a code of 1 to 32 bits for each group;
        [E, G / V, W, F] with ``ends``.
    bias: [F], x's dtype.
    residual: [..., F], or [..., F / 2] with an activation, x's dtype.
    norm_weight: [K], x's dtype, or None for 1; only with eps.
    ends: integers [E], not falling: where the rows of each weight end, of all rows of x.
    n: kept weights of a group.
    m: columns of a group, up to 32.
    activation: "silu", "gelu", "gelu_tanh", "relu", "sigmoid", or None; the first half of the
        outputs is then the gate of the second.
    eps, norm_offset: of ``fxgraft::rms_norm``; no norm if eps is None.

Returns:
    [..., F], or [..., F / 2] with an activation, in x's dtype and contiguous; sums are in float32
    (float64 for float64). It has gradients in all of x, values, bias, residual and norm_weight:
    training keeps the mask. Rounding may depend on the number of rows.

Raises:
    InputError: not 1 <= n <= m <= 32; dtypes differ; the shape or dtype of an argument does not
        fit; another activation; a norm weight without eps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft.kernels.accelerate import on_cuda
from fxgraft.kernels.define import define
from fxgraft.kernels.nm_linear import cost, reference, sparse_cores
from fxgraft.kernels.nm_linear.arguments import Parts, check
from fxgraft.kernels.nm_linear.layout import Layout
from fxgraft.kernels.nm_linear.packing import unpack
from fxgraft.kernels.spec import OpSpec, PackedWeight

_SLICE = 1 << 20


def _fake(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    *parts: Tensor | None,
    n: int,
    m: int,
    **options: Any,
) -> Tensor:
    given = Parts(*parts, **options)
    check(x, values, indices, given, (n, m))
    return x.new_empty(given.output_shape(x, values))


def _nm_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    *parts: Tensor | None,
    n: int,
    m: int,
    **options: Any,
) -> Tensor:
    """Unpack and multiply some rows of the weight at a time: the dense weight never exists."""
    given = Parts(*parts, **options)
    layout = check(x, values, indices, given, (n, m))
    x = _norm(x, given)
    if given.ends is None:
        return _finish(_multiply(x, values, indices, given.bias, layout), given)

    def multiply(rows: Tensor, expert: int) -> Tensor:
        return _multiply(rows, values[expert], indices[expert], given.bias, layout)

    return _finish(_by_expert(x, given.ends, values.shape[-2], multiply), given)


def _multiply(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, layout: Layout
) -> Tensor:
    features = values.shape[2]
    step = max(1, _SLICE // layout.columns)
    y = x.new_empty((*x.shape[:-1], features))
    for start in range(0, features, step):
        part = slice(start, start + step)
        weight = unpack(values[:, :, part], indices[:, :, part], layout.n, layout.m)
        addend = None if bias is None else bias[part]
        y[..., part] = torch.nn.functional.linear(x, weight, addend)
    return y


def _by_expert(
    x: Tensor, ends: Tensor, features: int, multiply: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """The rows of each expert times its weight; the ends are read on the host."""
    rows = x.reshape(-1, x.shape[-1])
    y = rows.new_zeros(rows.shape[0], features)
    first = 0
    for expert, end in enumerate(cast("list[int]", cast(Any, ends).tolist())):
        if end > first:
            y[first:end] = multiply(rows[first:end], expert)
            first = end
    return y.view(*x.shape[:-1], features)


def _norm(x: Tensor, given: Parts) -> Tensor:
    if given.eps is None:
        return x
    return torch.ops.fxgraft.rms_norm(x, given.norm_weight, eps=given.eps, offset=given.norm_offset)


def _finish(y: Tensor, given: Parts) -> Tensor:
    if given.activation is not None:
        gate, up = y.chunk(2, -1)
        y = torch.ops.fxgraft.gated_activation(gate, up, activation=given.activation)
    return (y if given.residual is None else given.residual + y).contiguous()


def _cuda(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    *parts: Tensor | None,
    n: int,
    m: int,
    **options: Any,
) -> Tensor:
    """The kernel that the table or the rule of ``config`` names, for each expert that has rows."""
    given = Parts(*parts, **options)
    layout = check(x, values, indices, given, (n, m))
    if given.ends is None:
        return _cuda_matrix(x, values, indices, given, layout)
    alone = Parts(bias=given.bias)

    def multiply(rows: Tensor, expert: int) -> Tensor:
        return _cuda_matrix(rows, values[expert], indices[expert], alone, layout)

    return _finish(_by_expert(_norm(x, given), given.ends, values.shape[-2], multiply), given)


def _cuda_matrix(
    x: Tensor, values: Tensor, indices: Tensor, given: Parts, layout: Layout
) -> Tensor:
    from fxgraft.kernels.nm_linear import triton

    config = triton.config_for(x, values, indices, layout)
    if config is not None and config.kernel in ("mma", "vector", "matrix"):
        if not triton.takes_norm(x, config):
            x, given = _norm(x, given), replace(given, norm_weight=None, eps=None)
        return triton.nm_linear(x, values, indices, given, layout=layout, config=config)
    x = _norm(x, given)
    if config is not None and config.kernel == "sparse":
        y = sparse_cores.linear(x, values, indices, given.bias, (layout.n, layout.m))
    else:
        tiled = config is not None and triton.has_tiles(values.dtype, layout)
        whole = (
            triton.unpack(values, indices, layout)
            if tiled
            else unpack(values, indices, layout.n, layout.m)
        )
        y = torch.nn.functional.linear(x, whole, given.bias)
    return _finish(y, given)


def _unpacked(node: Node, parts: Sequence[Tensor]) -> Tensor:
    values, indices = parts
    n, m = cost.pattern(node)
    return unpack(values, indices, n, m)


SPEC = define(
    OpSpec(
        name="nm_linear",
        kind="linear",
        reference=reference.nm_linear,
        flops=cost.flops,
        packed=PackedWeight(
            ("values", "indices"), cost.pattern, cost.features, _unpacked, cost.experts
        ),
    ),
    "(Tensor x, Tensor values, Tensor indices, Tensor? bias=None, Tensor? residual=None, "
    "Tensor? norm_weight=None, Tensor? ends=None, *, int n, int m, str? activation=None, "
    "float? eps=None, float norm_offset=0.0) -> Tensor",
    _fake,
    _nm_linear,
)
on_cuda(SPEC, _cuda, _nm_linear)
