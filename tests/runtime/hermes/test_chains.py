"""Chains: repeated stages, reasoning on one and several paths, hosts before and after, filters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fxgraft.runtime.hermes import System
from fxgraft.runtime.hermes.client import Client
from fxgraft.runtime.hermes.coordinator import Coordinator
from fxgraft.runtime.hermes.costs import AffineCost
from fxgraft.runtime.hermes.host import HostClient, Task
from fxgraft.runtime.hermes.network import Level, Network
from fxgraft.runtime.hermes.rag import RagClient
from fxgraft.runtime.hermes.results.result import Result
from fxgraft.runtime.hermes.stages import KINDS, Chain, Stage
from tests.runtime.hermes._systems import by_request, draw_requests, llm, request, run

COST = AffineCost(base=0.01, prefill_token=1e-4, sequence=1e-3, context=1e-6)
STRATEGIES = ["static", "continuous", "mixed", "chunked", "running_first", "alternating"]
TOOL: Chain = (
    Stage("prefill"), Stage("decode"), Stage("preprocess", task="tool"),
    Stage("prefill", tokens=50), Stage("decode"), Stage("postprocess", task="tool"),
)  # fmt: skip


def kinds(coordinator: Coordinator, index: int = 0) -> list[str]:
    stages = coordinator.stages.table()
    own = stages["request"] == index
    return [KINDS[int(kind)] for kind in stages["kind"][own]]


def test_one_request_takes_the_sum_of_its_stages_and_transfers() -> None:
    tool = HostClient("tool", tasks={"tool": Task(0.5, per_prompt_token=0.001)})
    clients: list[Client] = [llm(cost=COST), tool]
    one = request(0, 0.25, 100, 5, TOOL, plan=((5,), (3,)))
    coordinator = run([one], clients, network=Network(Level(1e4, 0.01)))
    assert kinds(coordinator) == [stage.kind for stage in TOOL]
    # Prompts: 100; then those, 5 answers and 50 more.
    first = 0.01 + 100e-4 + sum(0.011 + 1e-6 * context for context in range(101, 105))
    prompt = 105 + 50
    second = 0.01 + prompt * 1e-4 + sum(0.011 + 1e-6 * (prompt + i) for i in (1, 2))
    hosts = 0.5 + 0.105 + 0.5 + 0.001 * (prompt + 3)
    moves = 3 * 0.01 + 4 * (105 + 105 + 50 + prompt + 3) / 1e4
    found = by_request(coordinator)
    assert found["end"][0] - 0.25 == pytest.approx(first + second + hosts + moves, rel=1e-12)
    assert found["emitted"][0] == 8
    assert found["transfer_seconds"][0] == pytest.approx(moves, rel=1e-12)
    assert found["decode_gaps"][0] == 4 + 2


def test_a_repeated_stage_reuses_what_the_prefix_cache_has() -> None:
    clients: list[Client] = [
        llm(cost=COST, prefix_cache=True, block_size=10), HostClient("t", tasks={"tool": Task()}),
    ]  # fmt: skip
    one = request(0, 0.0, 100, 5, TOOL, plan=((5,), (3,)))
    coordinator = run([one], clients)
    steps = coordinator.steps.table()
    # 104 of the first round's tokens have KV: ten full blocks are found again.
    assert list(steps["prefill_tokens"][steps["prefill_tokens"] > 0]) == [100, 155 - 100]
    assert by_request(coordinator)["reused"][0] == 100


def simulate(stage: dict[str, Any], strategy: str = "chunked", **workload: Any) -> Result:
    return System.parse({
        "clients": [{"name": "gpu", "batching": strategy, "blocks": 4000, "max_sequences": 64,
                     "cost": {"base": 0.01, "prefill_token": 1e-4, "sequence": 1e-3}}],
        "workloads": [{"requests": 60, "arrivals": {"rate": 2.0}, "output": 20,
                       "prompt": {"kind": "uniform", "low": 1, "high": 300},
                       "chain": ["prefill", stage], **workload}],
    }).simulate()  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_path_is_a_longer_decode(strategy: str) -> None:
    scaled = simulate({"kind": "reasoning", "scale": 8.0}, strategy)
    plain = simulate({"kind": "decode"}, strategy, output=160)
    for column in ("first_token", "end", "emitted", "max_gap"):
        np.testing.assert_array_equal(scaled.requests[column], plain.requests[column])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_branch_of_several_paths_is_a_single_path(strategy: str) -> None:
    def found(plan: tuple[tuple[int, ...], ...]) -> Any:
        requests = draw_requests(np.random.default_rng(1), 40, rate=20.0)
        for one in requests:
            one.plan = plan or ((one.output,),)
        return by_request(run(requests, [llm(strategy=strategy)]))

    lengths = draw_requests(np.random.default_rng(1), 40, rate=20.0)
    plain = by_request(run(lengths, [llm(strategy=strategy)]))
    branched = found(())
    for column in ("first_token", "end", "emitted"):
        np.testing.assert_array_equal(plain[column], branched[column])


def test_branches_run_together_and_the_last_one_ends_the_stage() -> None:
    one = request(0, 0.0, 100, 1, plan=((3, 7, 5),))
    coordinator = run([one], [llm(cost=COST, stepwise=True)])
    steps = coordinator.steps.table()
    assert list(steps["decodes"]) == [0, 3, 3, 2, 2, 1, 1]
    # Each query reads the prompt and its own tokens.
    contexts = [0, 3 * 101, 3 * 102, 2 * 103, 2 * 104, 105, 106]
    assert list(steps["context"]) == contexts
    found = by_request(coordinator)
    expected = 0.01 + 100e-4 + sum(0.01 + n * 1e-3 + c * 1e-6 for n, c in zip(
        [3, 3, 2, 2, 1, 1], contexts[1:], strict=True))  # fmt: skip
    assert found["end"][0] == pytest.approx(expected, rel=1e-12)
    assert (found["emitted"][0], found["output"][0]) == (15, 15)


def test_the_prompt_is_held_once_and_every_branch_has_its_own_blocks() -> None:
    one = request(0, 0.0, 64, 1, plan=((17, 17, 17),))
    client = llm(cost=COST, blocks=100, block_size=16)
    run([one], [client])
    # Four for the prompt; the 17th token is emitted and has no KV: one block per branch.
    assert client.scheduler.pool.peak == 4 + 3
    assert client.scheduler.pool.used == 0
    client = llm(cost=COST, blocks=100, block_size=16)
    run([request(0, 0.0, 64, 1, plan=((18, 18, 18),))], [client])
    assert client.scheduler.pool.peak == 4 + 3 * 2


def test_lengths_of_branches_spread() -> None:
    result = simulate({"kind": "reasoning", "scale": 4.0, "branches": 8, "spread": 0.3})
    requests = result.requests
    assert (requests["emitted"] == requests["output"]).all()
    assert requests["output"].mean() == pytest.approx(8 * 80, rel=0.05)
    assert len(set(requests["output"])) > 30
    even = simulate({"kind": "reasoning", "scale": 4.0, "branches": 8}).requests
    assert set(even["output"]) == {8 * 80}


def test_more_branches_than_sequences_can_never_run() -> None:
    one = request(0, 0.0, 10, 1, plan=((5,) * 9,))
    coordinator = run([one], [llm(max_sequences=8)])
    assert coordinator.ended["rejected"] == 1
    assert "9 branches are more than the 8 sequences" in coordinator.reasons[0]


def test_a_safety_filter_of_another_model_reads_the_answer() -> None:
    result = System.parse({
        "clients": [{"name": "big", "model": "big", "cost": {"base": 0.05}},
                    {"name": "guard", "model": "guard", "cost": {"prefill_token": 1e-3}}],
        "workloads": [{"model": "big", "requests": 10, "arrivals": {"rate": 0.1}, "prompt": 30,
                       "output": 20, "chain": ["prefill", "decode",
                                               {"kind": "prefill", "model": "guard"}]}],
    }).simulate()  # fmt: skip
    steps = result.tables["steps"]
    assert steps["prefill_tokens"][steps["client"] == 1].tolist() == [50] * 10
    assert result.summary["total"]["e2e"]["p50"] == pytest.approx(20 * 0.05 + 50e-3)
    assert result.summary["total"]["output_tokens"] == 200


def test_a_host_truncates_and_counts_tokens() -> None:
    host = HostClient("host", tasks={"cut": Task(1.0, per_prompt_token=0.01, truncate=40),
                                     "look up": Task(per_output_token=0.1)})  # fmt: skip
    chain = (Stage("preprocess", task="cut"), Stage("prefill"), Stage("decode"),
             Stage("postprocess", task="look up"))  # fmt: skip
    coordinator = run([request(0, 0.0, 100, 6, chain)], [host, llm(cost=AffineCost())])
    assert by_request(coordinator)["end"][0] == pytest.approx(1.0 + 1.0 + 0.6)
    steps = coordinator.steps.table()
    assert steps["prefill_tokens"].sum() == 40


def test_a_batched_host_takes_all_that_waits() -> None:
    host = HostClient("host", tasks={"": Task(per_prompt_token=0.01)}, cores=4, batched=True)
    chain = (Stage("postprocess"),)
    requests = [request(i, 0.1 * i, 100 - 10 * i, chain=chain) for i in range(4)]
    found = by_request(run(requests, [host]))
    np.testing.assert_allclose(found["end"], [1.0, 1.9, 1.9, 1.9])


def test_all_stage_kinds_in_one_chain() -> None:
    """Several models, hosts, retrieval of text and of keys and values, two rounds of tokens."""
    system = System.parse({
        "clients": [
            {"kind": "host", "name": "host", "cores": 2, "tasks": {"default": {"seconds": 0.002}}},
            {"kind": "rag", "name": "rag", "embed": {"base": 0.001}, "rerank": {"base": 0.001},
             "index": {"dimension": 64, "centroids": 100, "probes": 4, "vectors_per_list": 50,
                       "subquantizers": 8, "flops": 1e12, "bandwidth": 1e11}},
            {"kind": "storage", "name": "store", "kv_bytes": 1000.0, "sharing": True,
             "levels": [{"bandwidth": 1e9}]},
            {"name": "gpu", "count": 2, "model": "m",
             "cost": {"base": 0.005, "prefill_token": 1e-5}},
        ],
        "network": {"inside_node": {"bandwidth": 1e9, "latency": 1e-5}, "sharing": True},
        "workloads": [{
            "model": "m", "requests": 80, "arrivals": {"rate": 3}, "prompt": 50, "output": 6,
            "context": 100, "keys": {"law": "zipf", "count": 20},
            "chain": ["preprocess", {"kind": "rag", "docs": 2, "tokens_per_doc": 30},
                      "embed", {"kind": "retrieve", "docs": 1, "tokens_per_doc": 8}, "rerank",
                      "kv_retrieval", "prefill", "decode", {"kind": "prefill", "tokens": 10},
                      {"kind": "reasoning", "scale": 3.0, "branches": 2}, "postprocess"],
        }],
    })  # fmt: skip
    result = system.simulate()
    requests = result.requests
    assert result.summary["total"]["completed"] == 80
    assert set(requests["emitted"]) == {6 + 2 * 18}
    stages = result.tables["stages"]
    for index in range(80):
        own = stages["request"] == index
        assert list(stages["stage"][own]) == list(range(11))
        starts, ends = stages["started"][own], stages["ended"][own]
        assert (stages["assigned"][own] <= starts).all()
        assert (starts <= ends).all()
        assert (ends[:-1] <= stages["assigned"][own][1:] + 1e-12).all()


def test_retrieval_on_two_clients_equals_one() -> None:
    from tests.runtime.hermes.test_rag import EMBED, INDEX

    def end(clients: list[Client], chain: Chain) -> float:
        return by_request(run([request(0, 0.0, 40, 1, chain)], clients))["end"][0]

    whole = end([RagClient("all", embed=EMBED, index=INDEX)], (Stage("rag"),))
    apart = end([RagClient("e", embed=EMBED), RagClient("i", index=INDEX)],
                (Stage("embed"), Stage("retrieve")))  # fmt: skip
    assert whole == pytest.approx(apart, rel=1e-12)
