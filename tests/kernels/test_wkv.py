"""``fxgraft::wkv`` against the weighted mean that it stands for."""

from __future__ import annotations

import torch

from fxgraft.kernels.wkv.op import SPEC
from tests.kernels._helpers import op_of, randn

wkv = op_of(SPEC)


def test_equals_weighted_mean() -> None:
    length = 6
    key, value = randn(2, length, 3), randn(2, length, 3, seed=1)
    decay, bonus = -randn(3, seed=2).exp(), randn(3, seed=3)
    for t in range(length):
        age = torch.arange(t - 1, -1, -1, dtype=torch.float64)[:, None]
        weights = torch.cat(
            [(age * decay + key[:, :t]).exp(), (bonus + key[:, t : t + 1]).exp()], 1
        )
        expected = (weights * value[:, : t + 1]).sum(1) / weights.sum(1)
        output, _ = wkv(key[:, : t + 1], value[:, : t + 1], decay, bonus)
        torch.testing.assert_close(output[:, t], expected)


def test_keys_out_of_range_of_exp_stay_finite() -> None:
    key = torch.tensor([300.0, -300.0, 900.0]).view(1, 3, 1)
    value = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    decay, bonus = torch.tensor([-0.5]), torch.tensor([0.0])
    output, state = wkv(key, value, decay, bonus)
    torch.testing.assert_close(output.flatten(), torch.tensor([1.0, 1.0, 3.0]))
    assert state.isfinite().all()


def test_first_key_far_below_zero_is_its_value() -> None:
    # a zero state has the exponent 0, against which exp(-300) vanishes in float32
    key, value = torch.full((1, 1, 1), -300.0), torch.full((1, 1, 1), 7.0)
    output, _ = wkv(key, value, torch.tensor([-1.0]), torch.tensor([0.0]), torch.zeros(1, 1, 3))
    assert output.item() == 7.0
