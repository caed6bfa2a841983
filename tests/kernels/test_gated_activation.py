"""``fxgraft::gated_activation`` against scalar formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.export import Dim

from fxgraft.errors import InputError
from fxgraft.kernels.gated_activation.op import SPEC
from tests.kernels._helpers import call_node, check_export, gradcheck, op_of, opcheck, randn

gated_activation = op_of(SPEC)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


SCALAR: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: max(x, 0.0),
    "sigmoid": _sigmoid,
}


@pytest.mark.parametrize("activation", SCALAR)
def test_oracle_and_gradient(activation: str) -> None:
    gate, up = randn(2, 3, 5, 7)
    products = [
        SCALAR[activation](float(g)) * float(u)
        for g, u in zip(gate.flatten(), up.flatten(), strict=True)
    ]
    expected = torch.tensor(products, dtype=torch.float64).view(gate.shape)
    torch.testing.assert_close(gated_activation(gate, up, activation=activation), expected)
    gradcheck(gated_activation, gate, up, activation=activation)


@pytest.mark.parametrize("trains", [False, True])
def test_opcheck(trains: bool) -> None:
    gate, up = randn(2, 3, 5).requires_grad_(trains), randn(2, 5, 3).transpose(1, 2)
    opcheck(SPEC, gate, up, activation="silu")


def test_unknown_activation() -> None:
    with pytest.raises(InputError, match=r"'swish'.*\n.*silu, gelu"):
        gated_activation(torch.ones(1), torch.ones(1), activation="swish")


def test_export() -> None:
    batch, length = Dim("batch"), Dim("length")
    check_export(
        (op_of(SPEC), SPEC.reference),
        tuple(randn(2, 2, 3, 4)),
        tuple(randn(2, 5, 1, 4)),
        ({0: batch, 1: length}, {0: batch, 1: length}),
        activation="gelu_tanh",
    )


def test_flops() -> None:
    x = torch.empty(2, 3, 5)
    assert SPEC.flops(call_node(SPEC, x, x, activation="relu")) == 2 * 2 * 3 * 5
