"""Jumping over steps gives the times of running every one of them, to 1e-9."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxgraft.cost_table import Identity, Memory, Origin, Part, StepCostTable, Validity
from fxgraft.runtime.hermes.client import Client
from fxgraft.runtime.hermes.coordinator import Coordinator
from fxgraft.runtime.hermes.costs import AffineCost, StepCost
from fxgraft.runtime.hermes.network import Level, Network
from fxgraft.runtime.hermes.results.gaps import gap_values
from tests.runtime.hermes._systems import by_request, draw_requests, llm, run

AFFINE = AffineCost(7.3e-3, 41e-6, 0.37e-3, 1.13e-6, 0.4e-6, 3e-9, watts=200.0)
STRATEGIES = ("static", "continuous", "mixed", "chunked", "running_first", "alternating")


def table_cost() -> StepCost:
    """A table with several knots, so that jumps end at them."""
    table = StepCostTable(
        identity=Identity(model="m", backend="none", device="none", weights="bfloat16",
                          activations="bfloat16", state="bfloat16"),
        memory=Memory(weights=0),
        origin=Origin(method="formula", points=1),
        validity=Validity(tokens=(1, 4096), sequences=(1, 64), new_tokens=(1, 4096),
                          context=(0, 4096)),
        parts=(
            Part(name="linear", per="step", axes={"tokens": (1, 97, 4096)},
                 seconds=(6.1e-3, 7.7e-3, 0.113)),
            Part(name="prompts", per="prefill",
                 axes={"new_tokens": (1, 4096), "context": (0, 4096)},
                 seconds=(0.0, 1e-3, 7e-3, 19e-3)),
            Part(name="decodes", per="decode",
                 axes={"batch": (1, 8, 64), "context": (1, 53, 211, 4096)},
                 seconds=tuple(float(v) * 1e-3 for v in (
                     0.1, 0.2, 0.27, 3.1, 0.7, 1.1, 2.3, 19.7, 4.1, 9.7, 17.3, 131.1))),
        ),
    )  # fmt: skip
    return table.pricer()


TABLE = table_cost()


@dataclass(frozen=True)
class Case:
    """A random system."""

    strategy: str
    admission: str
    order: str
    blocks: int
    swap: bool
    prefix_cache: bool
    disaggregated: bool
    table: bool
    branches: bool
    horizon: float
    timeout: float
    seed: int
    rate: float


cases = st.builds(
    Case,
    strategy=st.sampled_from(STRATEGIES),
    admission=st.sampled_from(["prompt", "sequence", "chunk"]),
    order=st.sampled_from(["fcfs", "least_work"]),
    blocks=st.sampled_from([32, 60, 90, 4000]),
    swap=st.booleans(),
    prefix_cache=st.booleans(),
    disaggregated=st.booleans(),
    table=st.booleans(),
    branches=st.booleans(),
    horizon=st.sampled_from([math.inf, math.inf, 2.0]),
    timeout=st.sampled_from([math.inf, math.inf, 1.0]),
    seed=st.integers(0, 10**6),
    rate=st.sampled_from([2.0, 8.0, 30.0]),
)


def simulate(case: Case, *, stepwise: bool) -> Coordinator:
    random = np.random.default_rng(case.seed)
    requests = draw_requests(random, 30, rate=case.rate, branches=case.branches)
    for one in requests:
        one.deadline = one.arrival + case.timeout
        if case.prefix_cache:
            one.prefix = ((1 + int(random.integers(3)), one.prompt * 3 // 4),)
    limits: dict[str, Any] = {
        "strategy": case.strategy,
        "admission": case.admission,
        "order": case.order,
        "blocks": case.blocks,
        "swap": case.swap,
        "prefix_cache": case.prefix_cache,
        "max_batched_tokens": 512,
        "max_sequences": 12,
        "cost": TABLE if case.table else AFFINE,
        "stepwise": stepwise,
        "options": {"kv_bytes": 1000.0, "swap_bandwidth": 1e7},
    }
    clients: list[Client] = [llm(**limits)]
    if case.disaggregated:
        clients = [llm(f"{role}-{i}", role=role, **limits)
                   for role in ("prefill", "decode") for i in range(2)]  # fmt: skip
    network = Network(Level(3e7, 1e-4), shared=True)
    return run(requests, clients, horizon=case.horizon, network=network)


def assert_same(fast: Coordinator, slow: Coordinator) -> None:
    """All logged times and counts are equal, whatever the number of rows of steps."""
    assert fast.ended == slow.ended
    assert fast.reasons == slow.reasons
    for name, column in by_request(fast).items():
        np.testing.assert_allclose(column, by_request(slow)[name], rtol=1e-9, atol=1e-9)
    for log in ("stages", "breaks", "transfers"):
        np.testing.assert_allclose(rows(fast, log), rows(slow, log), rtol=1e-9, atol=1e-9)
    for one, other in zip(fast.clients, slow.clients, strict=True):
        assert one.busy_seconds == pytest.approx(other.busy_seconds, rel=1e-9, abs=1e-12)
        assert one.step_joules == pytest.approx(other.step_joules, rel=1e-9, abs=1e-9)


def rows(coordinator: Coordinator, log: str) -> Any:
    """A log, sorted by request and then by time."""
    table = np.array(list(getattr(coordinator, log).table().values()))
    return table[:, np.lexsort((np.round(table[-2], 6), np.round(table[1]), table[0]))]


def all_gaps(coordinator: Coordinator) -> list[float]:
    gaps, weights = gap_values(coordinator.steps.table(), coordinator.gaps.table())
    return sorted(np.repeat(gaps, weights.astype(int)).tolist())


@settings(max_examples=150, deadline=None)
@given(cases)
def test_jumps_equal_steps(case: Case) -> None:
    fast, slow = simulate(case, stepwise=False), simulate(case, stepwise=True)
    assert_same(fast, slow)
    np.testing.assert_allclose(all_gaps(fast), all_gaps(slow), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_does_jump_and_the_cases_do_preempt(strategy: str) -> None:
    preempted = 0.0
    for seed in range(6):
        case = Case(strategy, "prompt", "fcfs", 32, False, False, False, False, False, math.inf,
                    math.inf, seed, 30.0)  # fmt: skip
        fast, slow = simulate(case, stepwise=False), simulate(case, stepwise=True)
        assert len(fast.steps.table()["start"]) < len(slow.steps.table()["start"])
        assert_same(fast, slow)
        preempted += by_request(fast)["preemptions"].sum()
    assert preempted > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_arrivals_exactly_at_the_ends_of_steps(strategy: str) -> None:
    """Sums in another order differ in the last digit; arrivals still come before steps."""
    random = np.random.default_rng(0)
    cost = AffineCost(base=0.01)
    requests = draw_requests(random, 200, prompt=60, output=9)
    for one in requests:
        one.arrival = round(one.arrival, 2)
    found: list[Coordinator] = []
    for stepwise in (False, True):
        fresh = [type(one)(one.index, one.arrival, one.prompt, one.output, one.chain, "m")
                 for one in requests]  # fmt: skip
        client = llm(strategy=strategy, cost=cost, stepwise=stepwise, max_sequences=8)
        found.append(run(fresh, [client]))
    assert_same(*found)
