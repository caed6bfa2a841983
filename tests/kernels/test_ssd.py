"""``fxgraft::ssd`` against masked attention, its dual form (arXiv 2405.21060)."""

from __future__ import annotations

import pytest
import torch

from fxgraft.kernels.ssd.op import SPEC
from tests.kernels._helpers import call_node, op_of, randn

ssd = op_of(SPEC)


@pytest.mark.parametrize("length", [1, 7, 70])
def test_equals_masked_attention(length: int) -> None:
    x, dt = randn(2, length, 4, 3), randn(2, length, 4, seed=1).exp()
    A, B, C = -randn(4).exp(), randn(2, length, 2, 5, seed=2), randn(2, length, 2, 5, seed=3)
    total = (dt * A).cumsum(1).transpose(1, 2)
    mask = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    key, query = (v.repeat_interleave(2, 2) for v in (B, C))  # two heads for each group
    scores = torch.einsum("bthn,bshn->bhts", query, key) * mask
    expected = torch.einsum("bhts,bshp->bthp", scores, dt[..., None] * x)
    torch.testing.assert_close(ssd(x, dt, A, B, C)[0], expected)


def test_time_steps_are_bounded() -> None:
    x, B = randn(1, 4, 1, 1), torch.ones(1, 4, 1, 1, dtype=torch.float64)
    dt = torch.tensor([-3.0, 0.2, 0.9, 5.0], dtype=torch.float64).view(1, 4, 1)
    A = torch.tensor([-1.0], dtype=torch.float64)
    bounded = ssd(x, dt, A, B, B, dt_min=0.1, dt_max=0.5)
    torch.testing.assert_close(bounded, ssd(x, dt.clamp(0.1, 0.5), A, B, B))
    assert not torch.allclose(bounded[0], ssd(x, dt, A, B, B)[0])


def test_strong_decay_keeps_every_digit() -> None:
    # sums of -400 over a chunk, whose float32 differences would be wrong in the fifth digit
    x, dt = randn(1, 64, 1, 2, dtype=torch.float32), torch.full((1, 64, 1), 8.0)
    dt[:, 1::2] = 1e-3
    A = torch.tensor([-1.0])
    B, C = (randn(1, 64, 1, 4, dtype=torch.float32, seed=seed) for seed in (1, 2))
    result = SPEC.reference(x.double(), dt.double(), A.double(), B.double(), C.double())
    assert isinstance(result, tuple)
    exact = result[0]
    torch.testing.assert_close(ssd(x, dt, A, B, C)[0].double(), exact, rtol=1e-5, atol=1e-5)


def test_flops() -> None:
    x, dt, B = randn(2, 5, 4, 3), randn(2, 5, 4), randn(2, 5, 2, 6)
    node = call_node(SPEC, x, dt, randn(4), B, B, randn(4), randn(4), x, softplus=True)
    assert SPEC.flops(node) == 2 * 5 * 4 * (3 * (5 * 6 + 1 + 2 + 5) + 2 + 1 + 3)
