"""Routers: every policy and measure, preferences, ties, and what a wrong router is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import pytest

from fxgraft.errors import Error
from fxgraft.runtime.hermes import System
from fxgraft.runtime.hermes.client import Client, Place
from fxgraft.runtime.hermes.request import Request
from fxgraft.runtime.hermes.routing import (
    Affinity,
    HeavyLight,
    LeastLoad,
    Measure,
    RoundRobin,
    Router,
)
from fxgraft.runtime.hermes.stages import Stage
from tests.runtime.hermes._systems import llm, request, run

MEASURES = get_args(Measure)


def chosen(router: Router, requests: Sequence[Request], count: int = 3, **options: Any) -> str:
    """The clients that requests went to, as one letter each."""
    clients = [llm("abcdef"[i], **options) for i in range(count)]
    coordinator = run(requests, clients, routers={"": router})
    stages = coordinator.stages.table()
    place = {int(r): int(c) for r, c in zip(stages["request"], stages["client"], strict=True)}
    return "".join("abcdef"[place[i]] for i in range(len(requests)))


def test_round_robin_takes_turns() -> None:
    assert chosen(RoundRobin(), [request(i, 0.1 * i, 5) for i in range(7)]) == "abcabca"


@pytest.mark.parametrize(("router", "expected"), [(RoundRobin(), "ccc"), (LeastLoad(), "bcb")])
def test_preferred_clients_go_first(router: Router, expected: str) -> None:
    """By turns the first of them that is there, by load the least busy of them."""
    requests = [request(i, 1e-3 * i, 5, preferred=("z", "c", "b")) for i in range(3)]
    assert chosen(router, requests) == expected


def test_ties_go_to_the_lowest_index() -> None:
    assert chosen(LeastLoad(), [request(i, 10.0 * i, 5) for i in range(3)]) == "aaa"


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_sees_what_is_queued(measure: Measure) -> None:
    """Three at one moment, before any step has run: all have a client to themselves, if the load
    counts what was only announced. Decodes count once they decode, or when they are handed over.
    """
    requests = [request(i, 0.0, 50, 20) for i in range(3)]
    expected = "aaa" if measure == "decodes" else "abc"
    assert chosen(LeastLoad(measure), requests) == expected


def test_decodes_and_memory_that_run_are_load() -> None:
    requests = [request(0, 0.0, 50, 200), request(1, 0.5, 5, 2)]
    for measure in ("decodes", "kv_tokens", "output_tokens", "busy_seconds"):
        assert chosen(LeastLoad(measure), requests) == "ab"
        requests = [request(0, 0.0, 50, 200), request(1, 0.5, 5, 2)]


def test_the_oracle_knows_outputs_and_the_prompt_measure_does_not() -> None:
    """Client a has a short prompt and a long answer, client b the reverse."""

    def requests() -> list[Request]:
        return [request(0, 0.0, 10, 500), request(1, 0.0, 400, 2), request(2, 0.001, 10, 2)]

    assert chosen(LeastLoad("output_tokens"), requests(), 2) == "abb"
    assert chosen(LeastLoad("prompt_tokens"), requests(), 2, max_batched_tokens=512) == "aba"


def test_heavy_and_light_requests_are_kept_apart() -> None:
    requests = [request(0, 0.0, 3000, 5), request(1, 0.0, 10, 5), request(2, 0.0, 10, 600),
                request(3, 0.0, 10, 512), request(4, 0.0, 2048, 5)]  # fmt: skip
    assert chosen(HeavyLight(), requests, 4) == "acbdc"


def test_a_single_candidate_serves_heavy_and_light_requests() -> None:
    requests = [request(0, 0.0, 3000, 5), request(1, 0.0, 10, 5)]
    assert chosen(HeavyLight(), requests, 1) == "aa"


def test_three_candidates_are_split_in_one_and_two() -> None:
    requests = [request(i, 0.0, 3000 if i < 2 else 10, 5) for i in range(4)]
    assert chosen(HeavyLight(), requests, 3) == "aabc"


def test_affinity_goes_by_the_key() -> None:
    keys = [4, 1, 4, 1, 3]
    requests = [request(i, 0.1 * i, 5, key=key) for i, key in enumerate(keys)]
    assert chosen(Affinity(), requests, 3) == "bbbba"


def test_near_prefers_the_node_of_the_stage_before() -> None:
    clients = [
        llm(f"{role}-{node}", role=role, options={"place": Place(node)})
        for role in ("prefill", "decode") for node in range(2)
    ]  # fmt: skip
    requests = [request(i, 0.1 * i, 50, 5) for i in range(6)]
    coordinator = run(requests, clients, routers={"decode": RoundRobin(prefer_near=True)})
    stages = coordinator.stages.table()
    pairs = Counter(tuple(stages["client"][stages["request"] == i].astype(int)) for i in range(6))
    assert pairs == {(0, 2): 3, (1, 3): 3}


def test_a_router_that_chooses_no_candidate() -> None:
    stranger = llm("stranger", role="decode")

    def router(kind: str, one: Request, candidates: Sequence[Client], now: float) -> Client:
        return stranger

    clients = [llm("a"), llm("b"), stranger]
    with pytest.raises(Error, match=r"(?s)chose 'stranger' for request 0.*no candidate.*a, b"):
        run([request(0, 0.0, 5)], clients, routers={"": router})


ROUTERS = [
    "round_robin", "affinity", {"policy": "round_robin", "near": True},
    {"policy": "heavy_light", "heavy_prompt": 100},
    *({"policy": "load", "measure": measure} for measure in MEASURES),
]  # fmt: skip


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_every_router_of_a_system_file(router: Any) -> None:
    system = System.parse({
        "clients": [
            {"kind": "host", "name": "host", "count": 2, "tasks": {"default": {"seconds": 0.01}}},
            {"name": "gpu", "count": 3, "cost": {"base": 0.01, "prefill_token": 1e-4}},
        ],
        "routing": {"default": router},
        "workloads": [{"requests": 200, "arrivals": {"rate": 40},
                       "prompt": {"kind": "uniform", "low": 1, "high": 300},
                       "output": {"kind": "uniform", "low": 1, "high": 20},
                       "chain": ["preprocess", "prefill", "decode"]}],
    })  # fmt: skip
    result = system.simulate()
    assert result.summary["total"]["completed"] == 200
    assert min(client["served"] for client in result.clients) > 0


def test_the_load_of_a_host_is_its_remaining_time() -> None:
    """A host with a long task is avoided by predicted seconds, not by the number of requests."""
    from fxgraft.runtime.hermes.host import HostClient, Task

    def hosts() -> list[Client]:
        return [HostClient(name, tasks={"": Task(per_prompt_token=1.0)}) for name in "ab"]

    def run_with(measure: Measure) -> list[int]:
        chain = (Stage("preprocess"),)
        requests = [request(0, 0.0, 10, chain=chain), request(1, 0.0, 1, chain=chain),
                    request(2, 0.5, 1, chain=chain)]  # fmt: skip
        stages = run(requests, hosts(), routers={"": LeastLoad(measure)}).stages.table()
        return [int(stages["client"][stages["request"] == i][0]) for i in range(3)]

    assert run_with("requests") == [0, 1, 0]
    assert run_with("busy_seconds") == [0, 0, 1]
