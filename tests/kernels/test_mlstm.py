"""``fxgraft::mlstm`` against its parallel form without stabiliser."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fxgraft.kernels.mlstm.op import SPEC
from tests.kernels._helpers import call_node, op_of, randn

mlstm = op_of(SPEC)


@pytest.mark.parametrize("length", [1, 5, 70])
def test_equals_parallel_form(length: int) -> None:
    query, key, value = (randn(2, length, 3, 4, seed=seed) for seed in range(3))
    write, forget = randn(2, length, 3, seed=3), randn(2, length, 3, seed=4)
    kept = F.logsigmoid(forget).cumsum(1).transpose(1, 2)
    weights = (kept[..., :, None] - kept[..., None, :] + write.transpose(1, 2)[..., None, :]).exp()
    scores = torch.einsum("bthd,bshd->bhts", query, key) * 0.5 * weights.tril()
    bound = scores.sum(-1, keepdim=True).abs().clamp_min(1)
    expected = torch.einsum("bhts,bshd->bthd", scores / bound, value)
    output, *_ = mlstm(query, key, value, write, forget, scale=0.5, epsilon=0.0)
    torch.testing.assert_close(output, expected)


def test_input_gates_out_of_range_of_exp_stay_finite() -> None:
    query, key, value = (randn(1, 4, 1, 2, dtype=torch.float32, seed=seed) for seed in range(3))
    write = torch.tensor([-500.0, 500.0, 0.0, 900.0]).view(1, 4, 1)
    for output in mlstm(query, key, value, write, torch.zeros(1, 4, 1), scale=1.0):
        assert output.isfinite().all()


def test_flops() -> None:
    gates = randn(2, 5, 3)
    node = call_node(
        SPEC, randn(2, 5, 3, 4), randn(2, 5, 3, 4), randn(2, 5, 3, 6), gates, gates, scale=1.0
    )
    assert SPEC.flops(node) == 2 * 5 * 3 * (5 * 4 * 6 + 6 * 4 + 6 + 12)
