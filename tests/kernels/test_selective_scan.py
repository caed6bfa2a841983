"""``fxgraft::selective_scan`` against its closed form."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fxgraft.kernels.selective_scan.op import SPEC
from tests.kernels._helpers import call_node, op_of, randn

selective_scan = op_of(SPEC)


def test_equals_sum_over_the_past() -> None:
    length = 20
    x, dt, z = randn(2, 3, length), randn(2, 3, length, seed=1), randn(2, 3, length, seed=2)
    A, D, bias = -randn(3, 4).exp(), randn(3), randn(3, seed=1)
    B, C = randn(2, 4, length, seed=3), randn(2, 4, length, seed=4)
    steps = F.softplus(dt + bias[:, None])
    total = steps.cumsum(2)
    elapsed = (total[..., :, None] - total[..., None, :]).tril()  # time from token s to token t
    decay = torch.exp(elapsed[..., None] * A[:, None, None])  # [B, D, T, S, N]
    weights = torch.einsum("bnt,bdtsn,bns->bdts", C, decay, B).tril()
    expected = torch.einsum("bdts,bds->bdt", weights, steps * x) + D[:, None] * x
    output, _ = selective_scan(x, dt, A, B, C, D, z, bias, softplus=True)
    torch.testing.assert_close(output, expected * F.silu(z))


def test_flops() -> None:
    x, state = randn(2, 3, 5), randn(2, 4, 5)
    node = call_node(SPEC, x, x, randn(3, 4), state, state, randn(3), x, softplus=True)
    assert SPEC.flops(node) == 2 * 3 * 5 * (7 * 4 + 1 + 2 + 5 + 3)
