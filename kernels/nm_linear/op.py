"""``fxgraft::nm_linear``: residual + activation(x Wᵀ + bias) with an N:M sparse weight W.

W [F, K] keeps at most N of every M inputs of a row and is stored packed, as
``fxgraft.kernels.nm_linear.packing.pack`` makes it and ``fxgraft.kernels.nm_linear.layout``
describes it: G = K / M groups in a row, V = gcd(G, 8) groups in a chunk. N is the number kept (for
Wanda and SparseGPT, the number pruned). Activation and residual are those of
``fxgraft::fused_linear``, and only lowering adds them.

Args:
    x: [..., K].
    values: [G / V, N, F, V], x's dtype.
    indices: [G / V, W, F], integers: which columns are kept, a code of 1 to 32 bits for each group.
    bias: [F], x's dtype.
    residual: [..., F], or [..., F / 2] with an activation, x's dtype.
    n: kept weights of a group.
    m: columns of a group, up to 32.
    activation: "silu", "gelu", "gelu_tanh", "relu", "sigmoid", or None; the first half of the
        outputs is then the gate of the second.

Returns:
    [..., F], or [..., F / 2] with an activation, in x's dtype and contiguous; sums are in float32
    (float64 for float64). It has gradients in all of x, values, bias and residual: training keeps
    the mask. Rounding may depend on the number of rows.

Raises:
    InputError: not 1 <= n <= m <= 32; dtypes differ; the shape or dtype of an argument does not
        fit; another activation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft.errors import InputError
from fxgraft.kernels.accelerate import on_cuda
from fxgraft.kernels.define import define
from fxgraft.kernels.gated_activation.reference import ACTIVATIONS
from fxgraft.kernels.nm_linear import cost, reference, sparse_cores
from fxgraft.kernels.nm_linear.layout import Layout, layout_of
from fxgraft.kernels.nm_linear.packing import unpack
from fxgraft.kernels.spec import OpSpec, PackedWeight

_SLICE = 1 << 20


def _check(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    pattern: tuple[int, int],
    activation: str | None,
) -> Layout:
    layout = layout_of(values, indices, *pattern)
    features = values.shape[2]
    dtypes = {t.dtype for t in (x, values, bias, residual) if t is not None}
    if len(dtypes) > 1:
        raise InputError(
            f"nm_linear's arguments have the dtypes {', '.join(sorted(map(str, dtypes)))}",
            "cast x, values, bias and residual to one dtype",
        )
    if x.dim() == 0 or x.shape[-1] != layout.columns:
        raise InputError(
            f"nm_linear's x is {list(x.shape)} for a weight [{features}, {layout.columns}]",
            "the last dimension of x is the number of inputs",
        )
    if activation is not None and (activation not in ACTIVATIONS or features % 2):
        raise InputError(
            f"nm_linear has the activation {activation!r} and {features} outputs",
            f"use one of {', '.join(ACTIVATIONS)} on gate and up of one size",
        )
    expected = (("bias", bias, (features,)), ("residual", residual, _shape(x, values, activation)))
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise InputError(f"nm_linear's {name} is {list(tensor.shape)}", f"pass {list(shape)}")
    return layout


def _shape(x: Tensor, values: Tensor, activation: str | None) -> tuple[int, ...]:
    return (*x.shape[:-1], values.shape[2] // (1 if activation is None else 2))


def _fake(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    n: int,
    m: int,
    activation: str | None = None,
) -> Tensor:
    _check(x, values, indices, bias, residual, (n, m), activation)
    return x.new_empty(_shape(x, values, activation))


def _nm_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    n: int,
    m: int,
    activation: str | None = None,
) -> Tensor:
    """Unpack and multiply some rows of the weight at a time: the dense weight never exists."""
    layout = _check(x, values, indices, bias, residual, (n, m), activation)
    features = values.shape[2]
    step = max(1, _SLICE // layout.columns)
    y = x.new_empty((*x.shape[:-1], features))
    for start in range(0, features, step):
        part = slice(start, start + step)
        weight = unpack(values[:, :, part], indices[:, :, part], n, m)
        addend = None if bias is None else bias[part]
        y[..., part] = torch.nn.functional.linear(x, weight, addend)
    return _finish(y, residual, activation)


def _finish(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    if activation is not None:
        gate, up = y.chunk(2, -1)
        y = torch.ops.fxgraft.gated_activation(gate, up, activation=activation)
    return (y if residual is None else residual + y).contiguous()


def _cuda(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    n: int,
    m: int,
    activation: str | None = None,
) -> Tensor:
    """The kernel that the table or the rule of ``config`` names."""
    from fxgraft.kernels.nm_linear import triton

    layout = _check(x, values, indices, bias, residual, (n, m), activation)
    config = triton.config_for(x, values, indices, layout)
    if config is not None and config.kernel in ("vector", "matrix"):
        return triton.nm_linear(
            x, values, indices, bias, residual,
            layout=layout, config=config, activation=activation,
        )  # fmt: skip
    if config is not None and config.kernel == "sparse":
        y = sparse_cores.linear(x, values, indices, bias, (n, m))
    else:
        tiled = config is not None and triton.has_tiles(values.dtype, layout)
        whole = triton.unpack(values, indices, layout) if tiled else unpack(values, indices, n, m)
        y = torch.nn.functional.linear(x, whole, bias)
    return _finish(y, residual, activation)


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
        packed=PackedWeight(("values", "indices"), cost.pattern, cost.features, _unpacked),
    ),
    "(Tensor x, Tensor values, Tensor indices, Tensor? bias=None, Tensor? residual=None, *, "
    "int n, int m, str? activation=None) -> Tensor",
    _fake,
    _nm_linear,
)
on_cuda(SPEC, _cuda, _nm_linear)
