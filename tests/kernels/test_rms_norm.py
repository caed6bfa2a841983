"""``fxgraft::rms_norm`` against loops, and its order of casts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from fxgraft.kernels.rms_norm.op import SPEC
from tests.kernels._helpers import call_node, check_export, gradcheck, op_of, opcheck, randn, values

rms_norm = op_of(SPEC)


def _naive(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    rows: list[list[float]] = []
    for row in values(x.reshape(-1, x.shape[-1])):
        scale = 1 / math.sqrt(sum(value * value for value in row) / len(row) + eps)
        rows.append(
            [value * scale * (w + offset) for value, w in zip(row, values(weight), strict=True)]
        )
    return torch.tensor(rows, dtype=torch.float64).view(x.shape)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (5,)])
def test_oracle_and_gradient(shape: tuple[int, ...], offset: float) -> None:
    x = randn(*shape)
    weight = randn(shape[-1], seed=1)
    y = rms_norm(x, weight, eps=1e-3, offset=offset)
    torch.testing.assert_close(y, _naive(x, weight, 1e-3, offset))
    gradcheck(rms_norm, x, weight, eps=1e-3, offset=offset)


def test_no_weight_is_weight_of_one() -> None:
    x = randn(3, 8, dtype=torch.float32)
    assert torch.equal(rms_norm(x, eps=1e-5), rms_norm(x, torch.ones(8), eps=1e-5))
    assert torch.equal(rms_norm(x, eps=1e-5, offset=2.0), rms_norm(x, eps=1e-5))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_casts_before_weight(weight_dtype: torch.dtype) -> None:
    x = randn(64, 32, dtype=torch.bfloat16) * 100
    weight = randn(32, dtype=weight_dtype)
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    y = rms_norm(x, weight, eps=1e-6)
    assert torch.equal(y, weight * normal.to(torch.bfloat16))
    assert not torch.equal(y.to(torch.bfloat16), (weight * normal).to(torch.bfloat16))


def test_half_precision_does_not_overflow() -> None:
    x = torch.full((1, 8), 6e4, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(x, eps=1e-6), torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("contiguous", [True, False])
def test_fast_equals_reference(dtype: torch.dtype, contiguous: bool) -> None:
    x = randn(6, 5, 16, dtype=dtype)
    x = x if contiguous else x.transpose(0, 1)
    weight = randn(16, dtype=dtype)
    y, expected = rms_norm(x, weight, eps=1e-5), SPEC.reference(x, weight, eps=1e-5)
    torch.testing.assert_close(y, expected)
    assert isinstance(expected, Tensor)
    assert y.stride() == expected.stride()


OPCHECKS: list[tuple[Tensor, Tensor | None, dict[str, Any]]] = [
    (randn(2, 3, 8).requires_grad_(), randn(8).requires_grad_(), {}),
    (randn(2, 3, 8).transpose(0, 1), None, {}),
    (randn(2, 8, dtype=torch.bfloat16), randn(8, dtype=torch.float32), {"offset": 1.0}),
]


@pytest.mark.parametrize(("x", "weight", "options"), OPCHECKS)
def test_opcheck(x: Tensor, weight: Tensor | None, options: dict[str, Any]) -> None:
    opcheck(SPEC, x, weight, eps=1e-6, **options)


def test_export() -> None:
    weight = randn(4)
    check_export(
        (op_of(SPEC), SPEC.reference),
        (randn(2, 3, 4), weight),
        (randn(1, 7, 4), weight),
        ({0: Dim("batch"), 1: Dim("length")}, None),
        eps=1e-6,
    )


def test_flops() -> None:
    x = torch.empty(2, 3, 5)
    assert SPEC.flops(call_node(SPEC, x, torch.empty(5), eps=0.0)) == 4 * 30
    assert SPEC.flops(call_node(SPEC, x, eps=0.0)) == 3 * 30
