"""``fxgraft::rotary`` against complex rotation, and the laws of a rotation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim

from fxgraft.errors import InputError
from fxgraft.kernels.rotary.op import SPEC
from tests.kernels._helpers import call_node, check_export, gradcheck, op_of, opcheck, randn

rotary = op_of(SPEC)


def _angles(batch: int, length: int, width: int) -> Tensor:
    """Angles [B, S, R/2] that differ in every entry."""
    return torch.arange(batch * length * width // 2, dtype=torch.float64).view(batch, length, -1)


def _tables(angles: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Cos and sin [B, 1, S, R] in the layout of the pairing."""
    wide = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 1, 2)
    return wide.cos()[:, None], wide.sin()[:, None]


def _naive(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Multiply each pair of channels, as a complex number, by exp(i · angle)."""
    y = x.clone()
    half = angles.shape[-1]
    for c in range(half):
        real, imaginary = (2 * c, 2 * c + 1) if interleaved else (c, c + half)
        pair = torch.complex(x[..., real], x[..., imaginary])
        angle = angles[:, None, :, c]
        pair = pair * torch.polar(torch.ones_like(angle), angle)
        y[..., real], y[..., imaginary] = pair.real, pair.imag
    return y


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [2, 6, 8])
@pytest.mark.parametrize(("batch", "table_batch"), [(1, 1), (3, 1), (3, 3)])
def test_oracle(batch: int, table_batch: int, width: int, interleaved: bool) -> None:
    x = randn(batch, 2, 5, 8)
    angles = _angles(table_batch, 5, width)
    y = rotary(x, *_tables(angles, interleaved), interleaved=interleaved)
    torch.testing.assert_close(y, _naive(x, angles, interleaved))
    assert torch.equal(y[..., width:], x[..., width:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient(interleaved: bool) -> None:
    x = randn(2, 2, 3, 6)
    cos, sin = _tables(_angles(1, 3, 4), interleaved)
    gradcheck(rotary, x, cos, sin, interleaved=interleaved)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    first=st.integers(-50, 50),
    second=st.integers(-50, 50),
    shift=st.integers(-50, 50),
    interleaved=st.booleans(),
)
def test_product_depends_on_distance(
    first: int, second: int, shift: int, interleaved: bool
) -> None:
    query, key = randn(2, 1, 1, 1, 8)
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64)

    def at(x: Tensor, position: int) -> Tensor:
        tables = _tables(position * frequencies[None, None], interleaved)
        return rotary(x, *tables, interleaved=interleaved)

    product = (at(query, first) * at(key, second)).sum()
    shifted = (at(query, first + shift) * at(key, second + shift)).sum()
    torch.testing.assert_close(product, shifted)


def test_result_has_dtype_of_x() -> None:
    x = randn(1, 2, 3, 4, dtype=torch.bfloat16)
    cos, sin = (table.float() for table in _tables(_angles(1, 3, 4), False))
    y = rotary(x, cos, sin)
    assert torch.equal(y, rotary(x.float(), cos, sin).to(torch.bfloat16))
    narrow = rotary(x, cos.to(torch.bfloat16), sin.to(torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    assert not torch.equal(y, narrow)


@pytest.mark.parametrize("width", [3, 6])
def test_bad_width(width: int) -> None:
    table = torch.ones(1, 1, 2, width)
    with pytest.raises(InputError, match=f"{width} of 4 channels"):
        rotary(torch.ones(1, 1, 2, 4), table, table)


@pytest.mark.parametrize(("width", "interleaved"), [(4, True), (8, False)])
def test_opcheck(width: int, interleaved: bool) -> None:
    x = randn(2, 3, 4, 8).transpose(1, 2).requires_grad_(interleaved)
    cos, sin = _tables(_angles(1, 3, width), interleaved)
    opcheck(SPEC, x, cos, sin, interleaved=interleaved)


def test_export() -> None:
    batch, length = Dim("batch"), Dim("length")
    cos, sin = _tables(_angles(1, 7, 4), True)
    check_export(
        (op_of(SPEC), SPEC.reference),
        (randn(2, 2, 3, 6), cos[:, :, :3], sin[:, :, :3]),
        (randn(5, 2, 7, 6), cos, sin),
        ({0: batch, 2: length}, {2: length}, {2: length}),
        interleaved=True,
    )


def test_flops() -> None:
    table = torch.empty(1, 1, 5, 4)
    assert SPEC.flops(call_node(SPEC, torch.empty(2, 3, 5, 8), table, table)) == 3 * 2 * 3 * 5 * 4
