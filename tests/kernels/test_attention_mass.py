"""``fxgraft::attention_mass``: shares of attention, and explicit sums of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from fxgraft.errors import InputError
from fxgraft.kernels.attention.op import SPEC as ATTENTION
from fxgraft.kernels.attention_mass.op import SPEC
from fxgraft.kernels.logit_sum.op import SPEC as LOGIT_SUM
from tests.kernels._helpers import call_node, check_export, gradcheck, op_of, opcheck, randn

attention_mass, attention, logit_sum = op_of(SPEC), op_of(ATTENTION), op_of(LOGIT_SUM)
HEADS, KV_HEADS, WIDTH, SCALE = 6, 2, 5, 0.3
RULES: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"is_causal": False},
    "window": {"window": 3},
    "chunk": {"chunk": 4},
    "softcap": {"softcap": 0.7},
    "key_mask": {"key_mask": torch.arange(9)[None] >= torch.tensor([0, 3])[:, None]},
    "float_bias": {"bias": randn(1, HEADS, 9, 9, seed=5)},
    "bool_bias": {"bias": randn(2, 1, 9, 9, seed=6) > -1, "is_causal": False},
    "sinks": {"sinks": randn(HEADS, seed=7)},
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def arguments(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    query = randn(2, HEADS, 9, WIDTH, dtype=dtype)
    key = randn(2, KV_HEADS, 9, WIDTH, dtype=dtype, seed=1)
    return query, key, randn(2, 9, seed=2) > 0


def by_attention(query: Tensor, key: Tensor, chosen: Tensor, rule: dict[str, Any]) -> Tensor:
    """Attention to values that are 1 at the chosen keys."""
    value = chosen[:, None, :, None].to(query.dtype).expand(-1, KV_HEADS, -1, 1)
    return attention(query, key, value, scale=SCALE, **rule)[..., 0]


@every_rule
def test_equals_attention_to_ones(rule: dict[str, Any]) -> None:
    query, key, chosen = arguments()
    mass = attention_mass(query, key, chosen, scale=SCALE, **rule)
    torch.testing.assert_close(mass, by_attention(query, key, chosen, rule))
    assert float(mass.min()) >= 0
    assert float(mass.max()) <= 1 + 1e-12


@every_rule
def test_masses_of_a_partition_sum_to_one(rule: dict[str, Any]) -> None:
    query, key, chosen = arguments()
    both = attention_mass(query, key, chosen, scale=SCALE, **rule)
    both = both + attention_mass(query, key, ~chosen, scale=SCALE, **rule)
    whole = by_attention(query, key, torch.ones_like(chosen), rule)
    torch.testing.assert_close(both, whole)
    sees = torch.ones_like(both) if rule is RULES["sinks"] else (whole > 0).to(both.dtype)
    assert rule is RULES["sinks"] or torch.allclose(both, sees)


def test_float32_is_exact_to_a_millionth_and_half_precision_is_summed_in_it() -> None:
    exact = attention_mass(*arguments(), scale=SCALE)
    single = attention_mass(*arguments(torch.float32), scale=SCALE)
    torch.testing.assert_close(single.double(), exact, atol=1e-6, rtol=0)
    half = attention_mass(*arguments(torch.bfloat16), scale=SCALE)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), exact, atol=2e-2, rtol=0)


def test_sum_of_logits_equals_the_summed_key() -> None:
    query, key, chosen = arguments()
    explicit = attention_mass(query, key, chosen, scale=SCALE, normalize=False)
    summed, _ = logit_sum(query, key, chosen, scale=SCALE)
    torch.testing.assert_close(explicit, summed)


@pytest.mark.parametrize("rule", ["window", "softcap", "float_bias", "key_mask", "chunk"])
def test_sum_of_logits_obeys_the_rules(rule: str) -> None:
    """Where a summed key would be wrong."""
    query, key, chosen = arguments()
    given = RULES[rule]
    found = attention_mass(query, key, chosen, scale=SCALE, normalize=False, **given)
    logits = SCALE * query @ key.repeat_interleave(HEADS // KV_HEADS, 1).mT
    cap = given.get("softcap", 0.0)
    logits = cap * torch.tanh(logits / cap) if cap else logits
    logits = logits + given["bias"] if "bias" in given else logits
    row, column = torch.arange(9)[:, None], torch.arange(9)
    seen = (column <= row) & (row - column < given.get("window", 9))
    if "key_mask" in given:
        seen = seen & given["key_mask"][:, None, None]
    if "chunk" in given:
        seen = seen & (row // 4 == column // 4)
    expected = torch.where(seen & chosen[:, None, None], logits, 0).sum(-1)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, logit_sum(query, key, chosen, scale=SCALE)[0])


def test_a_constant_offset_of_a_heads_logits_changes_no_mass() -> None:
    query, key, chosen = arguments()
    key[..., 0] = 1
    shifted = query.clone()
    shifted[:, 0, :, 0] += 2
    found = attention_mass(shifted, key, chosen, scale=SCALE)
    torch.testing.assert_close(found, attention_mass(query, key, chosen, scale=SCALE))


def test_new_queries_over_past_keys() -> None:
    query, key, chosen = arguments()
    whole = attention_mass(query, key, chosen, scale=SCALE)
    found = attention_mass(query[:, :, 6:], key, chosen, scale=SCALE)
    torch.testing.assert_close(found, whole[:, :, 6:])


def test_gradient() -> None:
    query, key, chosen = arguments()
    chosen = chosen[:, :4]

    def call(query: Tensor, key: Tensor) -> Tensor:
        return attention_mass(query, key, chosen, scale=SCALE, softcap=0.7)

    gradcheck(call, query[:, :, :4], key[:, :, :4])


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck(normalize: bool, trains: bool) -> None:
    query, key, chosen = arguments()
    query = query[:, :, 5:].clone().requires_grad_(trains)
    opcheck(SPEC, query, key, chosen, scale=SCALE, normalize=normalize)


def test_export() -> None:
    query, key, chosen = arguments()
    batch, length, total = Dim("batch"), Dim("length"), Dim("total", min=3)
    check_export(
        (op_of(SPEC), SPEC.reference),
        (query[:, :, 6:].contiguous(), key, chosen),
        (query[:1, :, 4:6], key[:1, :, :6], chosen[:1, :6]),
        ({0: batch, 2: length}, {0: batch, 2: total}, {0: batch, 1: total}),
        scale=SCALE,
    )


def test_bad_arguments() -> None:
    query, key, chosen = arguments()
    with pytest.raises(InputError, match="5 query heads for 2"):
        attention_mass(query[:, :5], key, chosen, scale=SCALE)
    with pytest.raises(InputError, match="window"):
        attention_mass(query, key, chosen, scale=SCALE, window=2, is_causal=False)
    with pytest.raises(InputError, match="9 queries but only 4 keys"):
        attention_mass(query, key[:, :, :4], chosen[:, :4], scale=SCALE)


def test_flops() -> None:
    node = call_node(SPEC, *arguments(), scale=SCALE)
    assert SPEC.flops(node) == 2 * 2 * HEADS * 9 * 9 * WIDTH
    windowed = call_node(SPEC, *arguments(), scale=SCALE, window=3)
    assert SPEC.flops(windowed) == 2 * 2 * HEADS * 9 * 3 * WIDTH
