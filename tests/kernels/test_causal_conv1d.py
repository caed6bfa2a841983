"""``fxgraft::causal_conv1d`` against PyTorch's padded convolution."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fxgraft.errors import InputError
from fxgraft.kernels.causal_conv1d.op import SPEC
from fxgraft.kernels.causal_conv1d.reference import causal_conv1d as reference
from tests.kernels._helpers import Op, call_node, op_of, randn

causal_conv1d = op_of(SPEC)


@pytest.mark.parametrize("function", [causal_conv1d, reference])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_equals_padded_convolution(function: Op, length: int) -> None:
    x, weight, bias = randn(2, 5, length), randn(5, 4), randn(5)
    expected = F.conv1d(x, weight.unsqueeze(1), bias, padding=3, groups=5)[..., :length]
    output, state = function(x, weight, bias, activation="silu")
    torch.testing.assert_close(output, F.silu(expected))
    assert torch.equal(state, F.pad(x, (3, 0))[..., -3:])


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(InputError, match="gelu"):
        causal_conv1d(randn(1, 2, 3), randn(2, 2), activation="gelu")


def test_flops() -> None:
    node = call_node(SPEC, randn(2, 3, 5), randn(3, 4), randn(3), activation="silu")
    assert SPEC.flops(node) == 2 * 3 * 5 * (2 * 4 + 1 + 4)
