"""``fxgraft::steer``: the sum where it fires, and every bit kept where it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from fxgraft.kernels.steer.op import SPEC
from tests.kernels._helpers import call_node, check_export, gradcheck, op_of, opcheck, randn

steer = op_of(SPEC)
SPECIAL = torch.tensor([-0.0, 0.0, 1e-45, float("nan"), float("inf"), -1.5])
VECTOR_SHAPES = [(6,), (2, 6)]
COEFFICIENT_SHAPES = [(), (2,)]


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _naive(x: Tensor, fire: Tensor, vector: Tensor, coefficient: Tensor) -> Tensor:
    y = x.clone()
    for b in range(x.shape[0]):
        v = vector[b] if vector.dim() == 2 else vector
        c = coefficient[b] if coefficient.dim() == 1 else coefficient
        for s in range(x.shape[1]):
            if fire[b, s]:
                y[b, s] += c.to(x.dtype) * v.to(x.dtype)
    return y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vector_shape", VECTOR_SHAPES)
@pytest.mark.parametrize("coefficient_shape", COEFFICIENT_SHAPES)
def test_oracle(
    coefficient_shape: tuple[int, ...], vector_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = randn(2, 7, 6, dtype=dtype)
    fire = randn(2, 7) > 0
    vector, coefficient = randn(*vector_shape, seed=1), randn(*coefficient_shape, seed=2)
    y = steer(x, fire, vector, coefficient)
    assert torch.equal(y, _naive(x, fire, vector, coefficient))
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_positions_keep_their_bits(dtype: torch.dtype) -> None:
    x = SPECIAL.to(dtype).expand(2, 3, 6)
    fire = torch.tensor([[True, False, False], [False, False, True]])
    vector = torch.tensor([1.0, float("nan"), 2.0, float("inf"), 0.0, 3.0])
    y = steer(x, fire, vector, torch.tensor(1.0))
    assert torch.equal(_bits(y)[~fire], _bits(x)[~fire])
    assert y[fire][:, 1].isnan().all()


@pytest.mark.parametrize(
    ("vector", "coefficient"),
    [
        (randn(6), torch.tensor(0.0)),
        (randn(6), torch.tensor(-0.0)),
        (torch.zeros(6), torch.tensor(3.0)),
        (torch.zeros(2, 6), torch.tensor([1.0, -1.0])),
        (randn(6), torch.tensor(1e-60, dtype=torch.float64)),
    ],
)
def test_neutral_setting_keeps_every_bit(vector: Tensor, coefficient: Tensor) -> None:
    x = SPECIAL.expand(2, 3, 6)
    y = steer(x, torch.ones(2, 3, dtype=torch.bool), vector, coefficient)
    assert torch.equal(_bits(y), _bits(x))


def test_neutral_row_leaves_the_others_steered() -> None:
    x = SPECIAL.expand(2, 1, 6)
    y = steer(x, torch.ones(2, 1, dtype=torch.bool), torch.ones(6), torch.tensor([0.0, 2.0]))
    assert torch.equal(_bits(y[0]), _bits(x[0]))
    assert torch.equal(y[1, 0, :2], torch.full((2,), 2.0))


def test_rows_look_their_vector_up() -> None:
    """A table with a slot per row is the same as a vector per row, gradients included."""
    x, fire = randn(4, 3, 6), randn(4, 3) > 0
    table, slot = randn(3, 6, seed=1), torch.tensor([2, 0, 1, 2])
    coefficient = randn(4, seed=2)
    expected = steer(x, fire, table[slot], coefficient)
    assert torch.equal(steer(x, fire, table, coefficient, slot), expected)

    def call(x: Tensor, table: Tensor, coefficient: Tensor) -> Tensor:
        return steer(x, fire, table, coefficient, slot)

    gradcheck(call, x, table, coefficient)
    opcheck(SPEC, x, fire, table, coefficient, slot)


@pytest.mark.parametrize("vector_shape", VECTOR_SHAPES)
@pytest.mark.parametrize("coefficient_shape", COEFFICIENT_SHAPES)
def test_gradient(coefficient_shape: tuple[int, ...], vector_shape: tuple[int, ...]) -> None:
    fire = torch.tensor([[True, False, True], [False, False, True]])

    def call(x: Tensor, vector: Tensor, coefficient: Tensor) -> Tensor:
        return steer(x, fire, vector, coefficient)

    gradcheck(call, randn(2, 3, 6), randn(*vector_shape), randn(*coefficient_shape))


@pytest.mark.parametrize(("vector_shape", "coefficient_shape"), [((6,), ()), ((2, 6), (2,))])
def test_opcheck(vector_shape: tuple[int, ...], coefficient_shape: tuple[int, ...]) -> None:
    x = randn(2, 6, 3).transpose(1, 2).requires_grad_(len(vector_shape) == 2)
    vector, coefficient = randn(*vector_shape), torch.ones(coefficient_shape)
    opcheck(SPEC, x, randn(2, 3) > 0, vector, coefficient)


def test_export() -> None:
    batch, length = Dim("batch"), Dim("length")
    vector, coefficient = randn(6), torch.tensor(2.0)
    check_export(
        (op_of(SPEC), SPEC.reference),
        (randn(2, 3, 6), randn(2, 3) > 0, vector, coefficient),
        (randn(4, 1, 6), randn(4, 1) > 0, vector, coefficient),
        ({0: batch, 1: length}, {0: batch, 1: length}, None, None),
    )


def test_flops() -> None:
    fire = torch.empty(2, 3, dtype=torch.bool)
    node = call_node(SPEC, torch.empty(2, 3, 6), fire, torch.empty(6), torch.tensor(1.0))
    assert SPEC.flops(node) == 2 * 3 * 6
