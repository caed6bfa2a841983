"""Nothing is lost or runs backwards: random chains, clients, links, horizons and strategies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxgraft.errors import Error
from fxgraft.runtime.hermes import System, sweep
from fxgraft.runtime.hermes.client import Client
from fxgraft.runtime.hermes.coordinator import Coordinator
from fxgraft.runtime.hermes.costs import AffineCost
from fxgraft.runtime.hermes.request import TRANSFER
from fxgraft.runtime.hermes.results.metrics import number_in_system
from tests.runtime.hermes._systems import llm, request, run

STAGES = [
    "preprocess", "postprocess", {"kind": "rag", "docs": 2, "tokens_per_doc": 20}, "embed",
    "retrieve", "kv_retrieval",
]  # fmt: skip
ANSWERS = [
    ["prefill", "decode"], ["prefill", {"kind": "reasoning", "scale": 2.0, "branches": 3,
                                        "spread": 0.5}], ["prefill"],
]  # fmt: skip


@st.composite
def chains(draw: st.DrawFn) -> list[Any]:
    """Anything before, between and after one or two answers."""
    chain: list[Any] = []
    for _ in range(draw(st.integers(1, 2))):
        chain += draw(st.lists(st.sampled_from(STAGES), max_size=3))
        chain += draw(st.sampled_from(ANSWERS))
    return chain + draw(st.lists(st.sampled_from(STAGES), max_size=2))


@st.composite
def systems(draw: st.DrawFn) -> dict[str, Any]:
    limits = {
        "batching": draw(st.sampled_from(
            ["static", "continuous", "mixed", "chunked", "running_first", "alternating"])),
        "blocks": draw(st.sampled_from([60, 100, 5000])), "max_sequences": 16,
        "max_batched_tokens": 1024, "prefix_cache": draw(st.booleans()),
        "preemption": draw(st.sampled_from(["recompute", "swap"])), "swap_bandwidth": 1e7,
        "cost": {"base": 0.01, "prefill_token": 5e-5, "sequence": 5e-4, "context": 1e-6},
        "kv_bytes": 1000.0, "idle_watts": 50.0, "watts": 400.0,
    }  # fmt: skip
    roles = draw(st.sampled_from([["both"], ["both"] * 2, ["prefill", "decode"],
                                  ["prefill", "prefill", "decode", "both"]]))  # fmt: skip
    routers = ["round_robin", "affinity", {"policy": "load", "measure": "busy_seconds"},
               {"policy": "load", "measure": "kv_tokens", "near": True}]  # fmt: skip
    return {
        "seed": draw(st.integers(0, 1000)),
        "horizon": draw(st.sampled_from([None, None, 3.0])),
        "clients": [
            {"kind": "host", "name": "host", "cores": 2, "count": 2,
             "tasks": {"default": {"seconds": 0.02, "law": "exponential"}}},
            {"kind": "rag", "name": "rag", "embed": {"base": 0.01}, "watts": 10.0,
             "index": {"dimension": 64, "centroids": 100, "probes": 4, "vectors_per_list": 50,
                       "subquantizers": 8, "flops": 1e10, "bandwidth": 1e9}},
            {"kind": "storage", "name": "store", "kv_bytes": 1000.0, "count": 2, "node": 1,
             "sharing": draw(st.booleans()),
             "levels": [{"bandwidth": 1e6, "capacity": 1e5}, {"bandwidth": 1e5, "shared_by": 2}]},
            *({"name": f"gpu{i}", "role": role, "node": i % 2, **limits}
              for i, role in enumerate(roles)),
        ],
        "network": {"inside_node": {"bandwidth": 1e7, "latency": 1e-4},
                    "node_to_node": {"bandwidth": 1e6, "latency": 1e-3},
                    "sharing": draw(st.booleans())},
        "routing": {"default": draw(st.sampled_from(routers))},
        "workloads": [
            {"name": "open", "requests": 15, "arrivals": {"rate": 8.0}, "context": 40,
             "prompt": {"kind": "uniform", "low": 1, "high": 400},
             "output": {"kind": "uniform", "low": 1, "high": 40},
             "keys": {"law": "uniform", "count": 4}, "chain": draw(chains()),
             "timeout": draw(st.sampled_from([None, 1.0]))},
            {"name": "closed", "requests": 10, "context": 40, "prompt": 60, "output": 9,
             "arrivals": {"kind": "closed", "users": 3, "think": 0.1}, "chain": draw(chains())},
        ],
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(systems())
def test_random_systems(description: dict[str, Any]) -> None:
    system = System.parse(description)

    def watch(coordinator: Coordinator) -> None:
        """Accepted = waiting or running at a client, or in transfer, or ended."""
        live = len(coordinator.live)
        assert coordinator.accepted == live + sum(coordinator.ended.values())
        moving = sum(one.state == TRANSFER for one in coordinator.live)
        here = sum(client.assigned for client in coordinator.clients)
        assert here == live
        assert moving <= live

    coordinator = system.coordinator(observer=watch)
    coordinator.run()
    check(coordinator, system.horizon)


def check(coordinator: Coordinator, horizon: float | None) -> None:
    requests, stages = coordinator.requests.table(), coordinator.stages.table()
    assert len(requests["request"]) == coordinator.accepted == len(set(requests["request"]))
    if horizon is None:
        assert coordinator.accepted == 25
        assert coordinator.ended["censored"] == 0
    completed = requests["state"] == 0
    decodes = requests["decode_gaps"] > 0
    np.testing.assert_array_equal(
        requests["emitted"][completed & decodes], requests["output"][completed & decodes]
    )
    assert (requests["end"] >= requests["arrival"] - 1e-12).all()
    # One request's stages follow each other.
    order = np.lexsort((stages["stage"], stages["request"]))
    assigned, started, ended = (stages[n][order] for n in ("assigned", "started", "ended"))
    assert (assigned <= started + 1e-9).all()
    assert (started <= ended + 1e-9).all()
    same = np.diff(stages["request"][order]) == 0
    assert (ended[:-1][same] <= assigned[1:][same] + 1e-9).all()
    for client in coordinator.clients:
        check_client(client, coordinator)


def check_client(client: Client, coordinator: Coordinator) -> None:
    steps = coordinator.steps.table()
    own = steps["client"] == client.index
    start, end = steps["start"][own], steps["end"][own]
    order = np.argsort(start, kind="stable")
    if client.servers == 1:
        assert (end[order][:-1] <= start[order][1:] + 1e-9).all()
    assert number_in_system(start, end, 1.0) <= client.servers * max(coordinator.now, 1e-9) + 1e-9
    assert client.busy_seconds <= client.servers * coordinator.now * (1 + 1e-9) + 1e-9
    assert client.busy_seconds == pytest.approx((end - start).sum(), abs=1e-9)
    assert client.step_joules == pytest.approx(steps["joules"][own].sum(), abs=1e-9)
    if client.kind == "llm":
        scheduler = getattr(client, "scheduler")  # noqa: B009
        most = 400.0 * client.busy_seconds
        # Swapping draws what an idle client draws.
        least = most / 8 if scheduler.limits.swap else most
        assert least * (1 - 1e-9) <= client.step_joules <= most * (1 + 1e-9)
        if not coordinator.ended["censored"]:
            assert scheduler.pool.used == 0
            assert scheduler.queries == scheduler.pending_prompt == scheduler.owed == 0


def test_littles_law_for_a_language_model_and_its_hosts() -> None:
    system = System.parse({
        "clients": [
            {"kind": "host", "name": "host", "tasks": {"default": {"seconds": 0.05}}},
            {"name": "gpu", "max_sequences": 8, "max_batched_tokens": 256,
             "cost": {"base": 0.01, "prefill_token": 5e-5}},
        ],
        "workloads": [{"requests": 3000, "arrivals": {"rate": 4}, "prompt": 100,
                       "output": {"kind": "uniform", "low": 1, "high": 60},
                       "chain": ["preprocess", "prefill", "decode"]}],
    })  # fmt: skip
    result = system.simulate()
    stages, requests, seconds = result.tables["stages"], result.requests, result.seconds
    whole = number_in_system(requests["arrival"], requests["end"], seconds)
    inside = 0.0
    for client in range(2):
        own = stages["client"] == client
        start, end = stages["assigned"][own], stages["ended"][own]
        number = number_in_system(start, end, seconds)
        assert number == pytest.approx(len(start) / seconds * (end - start).mean(), rel=1e-9)
        inside += number
    assert inside == pytest.approx(whole, rel=1e-9)


def test_a_lost_request_is_a_stall_that_says_who_waits() -> None:
    client = llm("gpu")
    client.scheduler.plan = lambda: None  # a scheduler that never plans anything
    with pytest.raises(Error, match=r"stuck at 0 s: 2 requests.*prefill.*gpu: request 0 heads a"):
        run([request(i, 0.0, 5, 5) for i in range(2)], [client])


def test_what_comes_after_the_horizon_was_never_accepted() -> None:
    requests = [request(i, float(i), 10, 3) for i in range(10)]
    coordinator = run(requests, [llm(cost=AffineCost(base=0.7))], horizon=4.5)
    assert coordinator.accepted == 5
    assert coordinator.ended["censored"] == 5 - coordinator.ended["completed"] > 0
    assert coordinator.now == 4.5


# -- determinism

FILE = """
seed: 5
clients:
  - {kind: host, name: host, tasks: {default: {seconds: 0.01, law: exponential}}}
  - name: gpu
    count: 2
    max_batched_tokens: 256
    max_sequences: 16
    cost: {base: 0.01, prefill_token: 5.0e-5, sequence: 5.0e-4, context: 1.0e-6}
workloads:
  - requests: 150
    arrivals: {rate: 12}
    prompt: {kind: uniform, low: 1, high: 300}
    output: {kind: uniform, low: 1, high: 60}
    chain: [preprocess, prefill, {kind: reasoning, branches: 3, spread: 0.4}, postprocess]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "system.yaml"
    path.write_text(FILE)
    return path


def log_of(system: System) -> Any:
    coordinator = system.coordinator()
    coordinator.run()
    return {name: getattr(coordinator, name).table() for name in ("requests", "steps", "stages")}


def test_a_run_repeats_bit_for_bit(file: Path) -> None:
    one, other = log_of(System.read(file)), log_of(System.read(file))
    changed = log_of(System.read(file, {"seed": 6}))
    for name, table in one.items():
        for column, values in table.items():
            np.testing.assert_array_equal(values, other[name][column])
    assert not np.array_equal(one["requests"]["end"], changed["requests"]["end"])


def test_logs_do_not_change_a_run(file: Path) -> None:
    whole = System.read(file).simulate()
    bare = System.read(file, {"logs": ["requests"]}).simulate()
    for column, values in whole.requests.items():
        np.testing.assert_array_equal(values, bare.requests[column])
    assert whole.summary["total"]["joules"] == bare.summary["total"]["joules"]
    exact, binned = whole.summary["total"]["itl"], bare.summary["total"]["itl"]
    assert exact["count"] == binned["count"]
    for figure in ("mean", "p50", "p99"):
        assert binned[figure] == pytest.approx(exact[figure], rel=1e-3)


@pytest.mark.slow
def test_the_number_of_processes_does_not_matter(file: Path) -> None:
    values = {"workloads.0.arrivals.rate": [6, 12], "clients.1.count": [1, 2]}
    alone, together = sweep(file, values), sweep(file, values, processes=2)
    assert [point.changes for point in alone] == [point.changes for point in together]
    assert repr(alone) == repr(together)
    rates = [point.summary["total"]["ttft"]["mean"] for point in alone]
    assert len(set(rates)) == 4


def test_two_tables_on_two_clients_never_share_prices() -> None:
    """The same steps at a tenth of the time on the second client."""
    system = System.parse({
        "clients": [{"name": n, "model": n, "cost": {"base": base}}
                    for n, base in (("a", 0.1), ("b", 0.01))],
        "workloads": [{"name": n, "model": n, "requests": 20, "output": 5, "prompt": 9,
                       "arrivals": {"kind": "regular", "rate": 0.5}} for n in "ab"],
    })  # fmt: skip
    result = system.simulate()
    for number, base in enumerate((0.1, 0.01)):
        own = result.requests["workload"] == number
        times = result.requests["end"][own] - result.requests["arrival"][own]
        np.testing.assert_allclose(times, 5 * base, rtol=1e-9)
    assert math.isnan(result.summary["total"]["tokens_per_joule"])
