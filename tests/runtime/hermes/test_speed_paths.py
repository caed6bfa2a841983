"""Shortcuts of the simulator: the strategy of this package's engine, and prices without detours."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fxgraft.devices import device
from fxgraft.runtime.hermes.dense import MODELS, DenseCost, Efficiency
from fxgraft.runtime.hermes.percentiles import nearest_ranks, weighted_nearest_ranks
from tests.runtime.hermes._systems import COST, by_request, draw_requests, llm, request, run
from tests.runtime.hermes.test_fast_forward import Case, all_gaps, assert_same, simulate

PLAIN = Case(
    strategy="alternating", admission="prompt", order="fcfs", blocks=4000, swap=False,
    prefix_cache=False, disaggregated=False, table=True, branches=False, horizon=math.inf,
    timeout=math.inf, seed=0, rate=8.0,
)  # fmt: skip
CASES: list[dict[str, Any]] = [
    {}, {"rate": 30.0}, {"blocks": 60, "rate": 30.0}, {"blocks": 32}, {"branches": True},
    {"table": False}, {"horizon": 2.0}, {"timeout": 1.0, "rate": 30.0}, {"disaggregated": True},
    {"prefix_cache": True, "blocks": 90}, {"swap": True, "blocks": 60, "rate": 30.0},
    {"admission": "sequence", "blocks": 90, "rate": 30.0}, {"order": "least_work", "rate": 30.0},
]  # fmt: skip


@pytest.mark.parametrize("changes", CASES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_jumps_of_alternating_steps(changes: dict[str, Any], seed: int) -> None:
    case = replace(PLAIN, seed=seed, **changes)
    fast, slow = simulate(case, stepwise=False), simulate(case, stepwise=True)
    assert_same(fast, slow)
    np.testing.assert_allclose(all_gaps(fast), all_gaps(slow), rtol=1e-9, atol=1e-12)


def test_alternating_steps_in_full() -> None:
    """Two prompts in turn, chunks of 100, and a decode step after each step of prompts."""
    requests = [request(0, 0.0, 150, 4), request(1, 0.0, 200, 2)]
    found = run(requests, [llm(strategy="alternating", max_batched_tokens=100)])
    steps = found.steps.table()
    contents = list(zip(steps["prefill_tokens"], steps["decodes"], strict=True))
    # A 100, B 100, A 50 and B 50, decode A; B 50, decode both; decode A.
    assert contents == [(100, 0), (100, 0), (100, 0), (0, 1), (50, 0), (0, 2), (0, 1)]
    durations = (steps["end"] - steps["start"]).tolist()
    wanted = [COST.price([(100, 0)]).seconds] * 3
    wanted += [COST.price((), 1, 151).seconds, COST.price([(50, 150)]).seconds]
    wanted += [COST.price((), 2, 152 + 201).seconds, COST.price((), 1, 153).seconds]
    assert durations == pytest.approx(wanted, rel=1e-12)
    table = by_request(found)
    assert table["first_token"].tolist() == pytest.approx([sum(wanted[:3]), sum(wanted[:5])])
    assert table["emitted"].tolist() == [4, 2]


def test_alternating_never_mixes_and_decodes_wait_for_one_step_of_prompts() -> None:
    requests = draw_requests(np.random.default_rng(3), 60, rate=20.0)
    found = run(requests, [llm(strategy="alternating", max_batched_tokens=128, max_sequences=8)])
    steps = found.steps.table()
    prompts, decodes = steps["prefill_tokens"] > 0, steps["decodes"] > 0
    assert not (prompts & decodes).any()
    assert steps["prefill_tokens"].max() <= 128
    running, waits = 0, 0
    for is_prompt, count in zip(prompts.tolist(), steps["decodes"].tolist(), strict=True):
        waits = waits + 1 if is_prompt and running else 0
        running = 0 if is_prompt and not running else count or running
        assert waits <= 1
    assert found.ended["completed"] == 60


@pytest.mark.parametrize("devices", [1, 4])
def test_a_dense_price_is_the_sum_of_its_parts(devices: int) -> None:
    share = Efficiency(0.6, 0.8, 0.4, 0.7, 0.5, 0.5, 0.2, 3e-6, 4e-4, 1e-8, 2e-5)
    cost = DenseCost(
        MODELS["llama-3.1-8b"], device("h100-sxm"), "float8", devices=devices, efficiency=share
    )
    for prefills, decodes, context in (
        ([(512, 0)], 0, 0), ([(300, 4000), (7, 0)], 9, 9000), ([], 64, 64 * 3000),
    ):  # fmt: skip
        price = cost.price(prefills, decodes, context)
        tokens = decodes + sum(new for new, _ in prefills)
        parts = [cost.without_attention(tokens, decodes + len(prefills))]
        parts += [cost.prefill_attention(new, cached) for new, cached in prefills]
        parts.append(cost.decode_attention(context))
        assert price.seconds == pytest.approx(sum(seconds for seconds, _ in parts), rel=1e-12)
        assert price.joules == pytest.approx(sum(joules for _, joules in parts), rel=1e-12)
    line = cost.decode_line(64, 64 * 3000)
    there = cost.price((), 64, 64 * 3500)
    assert line.seconds + line.seconds_per_key * 64 * 500 == pytest.approx(there.seconds)
    assert line.joules + line.joules_per_key * 64 * 500 == pytest.approx(there.joules)


def test_the_latency_of_links_can_be_scaled() -> None:
    def decode(factor: float) -> float:
        cost = DenseCost(
            MODELS["llama-3.1-70b"], device("h100-sxm"), "bfloat16", devices=8,
            efficiency=Efficiency(latency=factor),
        )  # fmt: skip
        return cost.price((), 1, 1000).seconds

    # 80 layers, two all-reduces each of 2 · 7 hops of 10 microseconds.
    assert decode(1.0) - decode(0.25) == pytest.approx(0.75 * 160 * 14 * 10e-6)


def test_several_ranks_at_once() -> None:
    values = np.random.default_rng(0).exponential(1.0, 997)
    ordered = np.sort(values)
    assert nearest_ranks(values, (50, 99)) == [ordered[498], ordered[987]]
    assert all(math.isnan(rank) for rank in nearest_ranks(np.empty(0)))
    weights = np.random.default_rng(1).integers(1, 5, 997).astype(float)
    repeated = np.repeat(values, weights.astype(int))
    assert weighted_nearest_ranks(values, weights) == nearest_ranks(repeated)
