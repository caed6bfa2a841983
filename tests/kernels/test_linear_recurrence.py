"""``fxgraft::linear_recurrence`` against its closed form."""

from __future__ import annotations

import torch

from fxgraft.kernels.linear_recurrence.op import SPEC
from tests.kernels._helpers import call_node, op_of, randn

linear_recurrence = op_of(SPEC)


def test_equals_sum_of_decayed_inputs() -> None:
    x, decay = randn(2, 9, 3), randn(2, 9, 3, seed=1).sigmoid()
    total = decay.log().cumsum(1)
    weights = (total[:, :, None] - total[:, None]).exp()  # [B, T, S, D]: decay from s to t
    weights = weights * torch.ones(9, 9, dtype=torch.float64).tril()[None, :, :, None]
    expected = (weights * x[:, None]).sum(2)
    output, state = linear_recurrence(x, decay)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(state, expected[:, -1])


def test_zero_decay_forgets_everything() -> None:
    x = randn(2, 4, 3)
    assert torch.equal(linear_recurrence(x, torch.zeros_like(x), randn(2, 3))[0], x)


def test_flops() -> None:
    node = call_node(SPEC, randn(2, 5, 3), randn(2, 5, 3))
    assert SPEC.flops(node) == 2 * 5 * 3 * 2
