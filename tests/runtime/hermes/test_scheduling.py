"""What steps contain: budgets, orders, admission, memory and preemption, in every strategy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxgraft.runtime.hermes.coordinator import Coordinator
from fxgraft.runtime.hermes.llm.client import LlmClient
from tests.runtime.hermes._systems import COST, by_request, draw_requests, llm, request, run

STRATEGIES = ["static", "continuous", "mixed", "chunked", "running_first", "alternating"]
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def simulate(seed: int, count: int = 60, *, rate: float = 15.0, branches: bool = False,
             **limits: Any) -> Coordinator:  # fmt: skip
    requests = draw_requests(np.random.default_rng(seed), count, rate=rate, branches=branches)
    return run(requests, [llm(**limits)])


def same_times(one: Coordinator, other: Coordinator) -> None:
    for column in ("first_token", "end", "max_gap"):
        np.testing.assert_allclose(by_request(one)[column], by_request(other)[column], rtol=1e-12)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_chunked_with_a_large_budget_is_mixed(seed: int) -> None:
    same_times(
        simulate(seed, 30, strategy="chunked", max_batched_tokens=1 << 20),
        simulate(seed, 30, strategy="mixed", max_batched_tokens=1 << 20),
    )


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_continuous_with_one_request_at_a_time_is_static(seed: int) -> None:
    same_times(
        simulate(seed, 20, strategy="continuous", max_sequences=1),
        simulate(seed, 20, strategy="static", max_sequences=1),
    )


@pytest.mark.parametrize("strategy", ["chunked", "running_first"])
def test_no_step_is_above_its_budget_and_every_decode_advances(strategy: str) -> None:
    budget = 96
    coordinator = simulate(5, strategy=strategy, max_batched_tokens=budget, max_sequences=64,
                           stepwise=True)  # fmt: skip
    steps = coordinator.steps.table()
    assert (steps["prefill_tokens"] + steps["decodes"]).max() <= budget
    assert (steps["prefill_tokens"] + steps["decodes"] == budget).any()
    # Nobody waits longer for a token than the dearest step that was run.
    assert by_request(coordinator)["max_gap"].max() <= (steps["end"] - steps["start"]).max() + 1e-12
    partial = 0
    for cut in steps["prefill_requests"][steps["prefill_tokens"] + steps["decodes"] < budget]:
        partial += cut
    assert partial > 0  # the last chunk of a prompt, with room left for no other


def test_prefills_stall_decodes_only_where_steps_are_separate() -> None:
    """A long prompt arrives while another request decodes."""

    def gap(strategy: str) -> float:
        requests = [request(0, 0.0, 10, 40), request(1, 0.1, 4000, 2)]
        client = llm(strategy=strategy, max_batched_tokens=4096 if strategy != "chunked" else 256)
        return by_request(run(requests, [client]))["max_gap"][0]

    prefill = COST.price([(4000, 0)]).seconds
    assert gap("continuous") > prefill
    assert gap("mixed") == pytest.approx(prefill, rel=0.02)
    assert gap("chunked") < prefill / 8


def test_static_takes_nobody_in_before_its_batch_has_ended() -> None:
    requests = [request(0, 0.0, 10, 50), request(1, 0.01, 10, 5)]
    stages = run(requests, [llm(strategy="static")]).stages.table()
    first_ended = stages["ended"][(stages["request"] == 0) & (stages["stage"] == 1)][0]
    second_began = stages["started"][(stages["request"] == 1) & (stages["stage"] == 0)][0]
    assert second_began == first_ended


@every_strategy
def test_first_come_first_served(strategy: str) -> None:
    """Without preemption prompts start in the order in which they came."""
    coordinator = simulate(8, strategy=strategy, max_sequences=6, max_batched_tokens=512)
    stages = coordinator.stages.table()
    own = stages["stage"] == 0
    order = np.argsort(stages["request"][own])
    assert (np.diff(stages["started"][own][order]) >= 0).all()


@every_strategy
def test_least_work_takes_short_prompts_first(strategy: str) -> None:
    prompts = [300, 40, 200, 10, 10]
    requests = [request(i, 0.0 if i == 0 else 1e-3, p, 2) for i, p in enumerate(prompts)]
    client = llm(strategy=strategy, order="least_work", max_sequences=1)
    stages = run(requests, [client]).stages.table()
    own = stages["stage"] == 0
    order = stages["request"][own][np.argsort(stages["started"][own])]
    assert list(order) == [0, 3, 4, 1, 2]  # ties by arrival


@every_strategy
def test_a_request_of_one_token_never_decodes(strategy: str) -> None:
    coordinator = run([request(i, 0.0, 20, 1) for i in range(3)], [llm(strategy=strategy)])
    found = by_request(coordinator)
    assert list(found["emitted"]) == [1, 1, 1]
    np.testing.assert_array_equal(found["end"], found["first_token"])
    assert coordinator.steps.table()["decodes"].sum() == 0


@pytest.mark.parametrize("strategy", ["static", "continuous", "mixed"])
def test_a_prompt_over_the_budget_is_rejected_and_blocks_nobody(strategy: str) -> None:
    requests = [request(0, 0.0, 600, 4), request(1, 0.0, 100, 4)]
    coordinator = run(requests, [llm(strategy=strategy, max_batched_tokens=512)])
    assert (coordinator.ended["rejected"], coordinator.ended["completed"]) == (1, 1)
    assert "600 tokens exceeds the 512 tokens of a step" in coordinator.reasons[0]


@pytest.mark.parametrize("strategy", ["chunked", "running_first"])
def test_a_prompt_over_the_budget_is_cut(strategy: str) -> None:
    client = llm(strategy=strategy, max_batched_tokens=256, max_sequences=8)
    coordinator = run([request(0, 0.0, 600, 2)], [client])
    steps = coordinator.steps.table()
    assert list(steps["prefill_tokens"]) == [256, 256, 88, 0]


@every_strategy
def test_what_never_fits_is_rejected_with_a_reason(strategy: str) -> None:
    options = {"context_length": 300}
    requests = [request(0, 0.0, 100, 100), request(1, 0.0, 250, 60), request(2, 0.0, 10, 5)]
    coordinator = run(requests, [llm(strategy=strategy, blocks=12, options=options)])
    assert coordinator.ended["completed"] == 1
    assert coordinator.reasons == {
        0: "it needs 13 KV blocks, client 'llm' has 12",
        1: "its 310 tokens are more than the context length of 300 of client 'llm'",
    }


def peak_of(admission: str) -> tuple[float, int]:
    """Preemptions and most blocks of four requests that together need more than there is."""
    requests = [request(i, 0.0, 32, 100) for i in range(4)]
    client = llm(blocks=12, admission=admission)
    coordinator = run(requests, [client])
    assert coordinator.ended["completed"] == 4
    return by_request(coordinator)["preemptions"].sum(), client.scheduler.pool.peak


def test_admission_by_whole_sequences_preempts_less() -> None:
    """A sequence is admitted if it fits beside what the others hold at that moment."""
    by_prompt, by_sequence = peak_of("prompt"), peak_of("sequence")
    assert 0 < by_sequence[0] < by_prompt[0]
    assert by_prompt[1] == by_sequence[1] == 12


@every_strategy
@pytest.mark.parametrize("swap", [False, True])
def test_preemption_takes_the_latest_and_changes_no_first_token(strategy: str, swap: bool) -> None:
    requests = [request(i, 0.0, 60, 60) for i in range(3)]
    client = llm(strategy=strategy, blocks=14, swap=swap,
                 options={"kv_bytes": 1e3, "swap_bandwidth": 1e6})  # fmt: skip
    coordinator = run(requests, [client])
    found = by_request(coordinator)
    assert coordinator.ended["completed"] == 3
    assert found["preemptions"][0] == 0
    assert found["preemptions"][2] > 0
    np.testing.assert_array_equal(found["emitted"], found["output"])
    breaks = coordinator.breaks.table()
    for index, stopped in zip(breaks["request"], breaks["stopped"], strict=True):
        assert found["first_token"][int(index)] <= stopped
    if swap:
        assert found["recomputed"].sum() == 0
    else:
        assert found["recomputed"].sum() > 0
    assert client.scheduler.pool.used == 0


def test_swapping_charges_the_way_out_and_back() -> None:
    def busy(bandwidth: float) -> tuple[float, float]:
        requests = [request(i, 0.0, 60, 60) for i in range(3)]
        client = llm(blocks=14, swap=True,
                     options={"kv_bytes": 1e3, "swap_bandwidth": bandwidth})  # fmt: skip
        coordinator = run(requests, [client])
        return client.busy_seconds, float(len(coordinator.breaks.table()["request"]))

    fast, number = busy(1e12)
    slow, same = busy(1e6)
    assert same == number > 0
    # Out and back: between 60 and 120 tokens of 1 kB at 1 MB/s, for each break.
    assert 2 * 60e-3 * number <= slow - fast <= 2 * 120e-3 * number


def test_a_step_that_preempts_admits_nobody() -> None:
    random = np.random.default_rng(4)
    requests = draw_requests(random, 40, rate=50.0, prompt=100)
    client = llm(blocks=24, stepwise=True, max_batched_tokens=256, max_sequences=16)
    scheduler, admitted = client.scheduler, 0
    plan, running = scheduler.plan, set[Any]()

    def watched() -> None:
        nonlocal running, admitted
        running = set(scheduler.running)
        plan()
        new = set(scheduler.running) - running
        assert not (scheduler.preempted and new and scheduler.with_decodes)
        admitted += len(new)

    scheduler.plan = watched
    coordinator = run(requests, [client])
    assert by_request(coordinator)["preemptions"].sum() > 0
    assert admitted >= 40


@every_strategy
@given(seed=st.integers(0, 10**6), branches=st.booleans(), prefix_cache=st.booleans(),
       blocks=st.sampled_from([40, 80, 400]))  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_blocks_are_never_overdrawn(
    strategy: str, seed: int, branches: bool, prefix_cache: bool, blocks: int
) -> None:
    client = llm(strategy=strategy, blocks=blocks, prefix_cache=prefix_cache, max_sequences=20)
    pool = client.scheduler.pool

    def watch(coordinator: Coordinator) -> None:
        assert 0 <= pool.used <= pool.capacity

    requests = draw_requests(np.random.default_rng(seed), 30, rate=20.0, branches=branches)
    for one in requests:
        one.prefix = ((one.index % 3, one.prompt // 2),) if prefix_cache else ()
    coordinator = run(requests, [client], observer=watch)
    assert pool.used == 0
    found = by_request(coordinator)
    done = found["state"] == 0
    np.testing.assert_array_equal(found["emitted"][done], found["output"][done])


# -- prefix cache


def shared(count: int, tokens: int) -> list[Any]:
    """One at a time, with one start in common."""
    return [request(i, 10.0 * i, 100, 2, prefix=((5, tokens),)) for i in range(count)]


def test_a_common_start_is_computed_once() -> None:
    client: LlmClient = llm(prefix_cache=True, block_size=16)
    coordinator = run(shared(3, 90), [client])
    steps = coordinator.steps.table()
    # Five full blocks of 16 in 90 tokens.
    assert list(steps["prefill_tokens"][steps["prefill_tokens"] > 0]) == [100, 20, 20]
    assert list(by_request(coordinator)["reused"]) == [0, 80, 80]
    off = run(shared(3, 90), [llm()]).steps.table()
    assert off["prefill_tokens"].sum() == 300


def test_the_last_token_of_a_cached_prompt_is_computed() -> None:
    requests = [request(i, 10.0 * i, 64, 2, prefix=((5, 64),)) for i in range(2)]
    steps = run(requests, [llm(prefix_cache=True, block_size=16)]).steps.table()
    assert list(steps["prefill_tokens"][steps["prefill_tokens"] > 0]) == [64, 16]


def test_cached_blocks_leave_when_others_need_the_memory() -> None:
    requests = shared(2, 90)
    between = request(9, 5.0, 150, 2)  # ten blocks of ten
    requests[1].arrival = 10.0
    client = llm(prefix_cache=True, block_size=16, blocks=10)
    steps = run([*requests, between], [client]).steps.table()
    assert list(steps["prefill_tokens"][steps["prefill_tokens"] > 0]) == [100, 150, 100]
