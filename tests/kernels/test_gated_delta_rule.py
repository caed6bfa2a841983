"""``fxgraft::gated_delta_rule``: what a delta rule must remember and replace."""

from __future__ import annotations

import pytest
import torch

from fxgraft.kernels.gated_delta_rule.op import SPEC
from tests.kernels._helpers import call_node, op_of, randn

gated_delta_rule = op_of(SPEC)


@pytest.mark.parametrize("channels", [(), (4,)])
def test_orthogonal_keys_are_all_remembered(channels: tuple[int, ...]) -> None:
    key = torch.eye(4, dtype=torch.float64).view(1, 4, 1, 4)
    value, ones = randn(1, 4, 1, 5), torch.ones(1, 4, 1, dtype=torch.float64)
    gate = torch.zeros(1, 4, 1, *channels, dtype=torch.float64)
    _, memory = gated_delta_rule(key, key, value, gate, ones, scale=1.0)
    recalled, _ = gated_delta_rule(key, key, value, gate, 0 * ones, memory, scale=1.0)
    torch.testing.assert_close(recalled, value)


def test_same_key_replaces_the_old_value() -> None:
    key = torch.ones(1, 70, 1, 1, dtype=torch.float64)
    value, ones = randn(1, 70, 1, 3), torch.ones(1, 70, 1, dtype=torch.float64)
    output, memory = gated_delta_rule(key, key, value, 0 * ones, ones, scale=1.0)
    torch.testing.assert_close(output, value)
    torch.testing.assert_close(memory[0, 0, 0], value[0, -1, 0])


def test_equal_channel_gates_are_a_head_gate() -> None:
    query, key, value = (randn(2, 37, 3, 4, seed=seed) for seed in range(3))
    gate, beta = -randn(2, 37, 3, seed=3).exp(), randn(2, 37, 3, seed=4).sigmoid()
    by_head = gated_delta_rule(query, key, value, gate, beta, scale=0.5, l2norm=True)
    gates = gate.unsqueeze(-1).expand(-1, -1, -1, 4)
    by_channel = gated_delta_rule(query, key, value, gates, beta, scale=0.5, l2norm=True)
    torch.testing.assert_close(by_channel, by_head)


def test_norm_makes_length_irrelevant() -> None:
    query, key, value = (randn(1, 6, 2, 8, seed=seed) for seed in range(3))
    gate, beta = torch.zeros(1, 6, 2), torch.full((1, 6, 2), 0.5)
    expected = gated_delta_rule(query, key, value, gate, beta, scale=1.0, l2norm=True)
    scaled = gated_delta_rule(9 * query, 5 * key, value, gate, beta, scale=1.0, l2norm=True)
    torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=1e-5)


def test_strong_decay_stays_finite_and_exact() -> None:
    # decays of e^-200 a token underflow, and their inverse would overflow
    query, key, value = (randn(1, 40, 1, 4, dtype=torch.float32, seed=seed) for seed in range(3))
    ones = torch.ones(1, 40, 1)
    for gate in (-200 * ones, -200 * torch.ones(1, 40, 1, 4)):
        output, _ = gated_delta_rule(query, key, value, gate, ones, scale=1.0)
        torch.testing.assert_close(output, (query * key).sum(-1, keepdim=True) * value)


def test_flops() -> None:
    query, value, gate = randn(2, 5, 2, 3), randn(2, 5, 4, 6), randn(2, 5, 4)
    node = call_node(SPEC, query, query, value, gate, gate, scale=1.0)
    assert SPEC.flops(node) == 2 * 5 * (4 * (7 * 3 * 6 + 2 * 6 + 1) + 2 * 3)
