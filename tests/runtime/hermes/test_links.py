"""Transfers: bytes, paths, fair sharing of bandwidth, layer-wise hand-over, collectives."""

from __future__ import annotations

import heapq
import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxgraft.runtime.hermes import System
from fxgraft.runtime.hermes.client import Client, Place
from fxgraft.runtime.hermes.communication import all_gather, all_reduce, point_to_point
from fxgraft.runtime.hermes.config.links import PRESETS
from fxgraft.runtime.hermes.coordinator import Coordinator
from fxgraft.runtime.hermes.costs import AffineCost
from fxgraft.runtime.hermes.host import HostClient, Task
from fxgraft.runtime.hermes.network import Level, Network
from fxgraft.runtime.hermes.sharing import FairShare, Flow, fair_rates
from fxgraft.runtime.hermes.stages import Chain, Stage
from fxgraft.runtime.hermes.storage import StorageClient, StorageLevel
from fxgraft.runtime.hermes.transfers import Sizes, visible_bytes
from tests.runtime.hermes._systems import by_request, llm, request, run

HOP: Chain = (Stage("preprocess", task="a"), Stage("postprocess", task="b"))


def hosts(*places: int, cores: int = 64) -> list[Client]:
    """Hosts a, b, ... that take no time."""
    return [
        HostClient(name, tasks={name: Task()}, cores=cores, place=Place(node))
        for name, node in zip("abcdef", places, strict=False)
    ]


def moves(coordinator: Coordinator) -> list[tuple[float, float, float]]:
    """Start, end and bytes of each transfer, in order of their ends."""
    table = coordinator.transfers.table()
    found = zip(table["start"], table["end"], table["bytes"], strict=True)
    return sorted(found, key=lambda row: row[1])


# -- one link


@pytest.mark.parametrize(("shared", "ends"), [(True, [2.0, 2.0]), (False, [1.0, 1.0])])
def test_two_equal_transfers_at_one_time(shared: bool, ends: list[float]) -> None:
    network = Network(Level(4000.0), shared=shared)
    requests = [request(i, 0.0, 1000, chain=HOP) for i in range(2)]
    found = by_request(run(requests, hosts(0, 0), network=network))
    np.testing.assert_allclose(found["end"], ends, rtol=1e-12)
    np.testing.assert_allclose(found["transfer_seconds"], ends, rtol=1e-12)


def test_a_later_transfer_slows_the_first_and_neither_wastes_bandwidth() -> None:
    network = Network(Level(4000.0, 0.125), shared=True)
    requests = [request(0, 0.0, 1000, chain=HOP), request(1, 0.5, 250, chain=HOP)]
    coordinator = run(requests, hosts(0, 0), network=network)
    # Alone until 0.5; half the rate each until the small one is through at 1.0; alone again.
    assert moves(coordinator) == [
        pytest.approx((0.5, 1.0 + 0.125, 1000.0)), pytest.approx((0.0, 1.25 + 0.125, 4000.0)),
    ]  # fmt: skip


@given(st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(1, 3000)), min_size=1, max_size=12))
def test_sharing_is_work_conserving(flows: list[tuple[float, int]]) -> None:
    """The link is busy until all bytes are through: the last end is that of a single queue."""
    requests = [request(i, at, size, chain=HOP) for i, (at, size) in enumerate(flows)]
    network = Network(Level(4000.0), shared=True)
    found = moves(run(requests, hosts(0, 0), network=network))
    free = 0.0
    for at, size in sorted(flows):
        free = max(free, at) + 4 * size / 4000.0
    assert found[-1][1] == pytest.approx(free, rel=1e-9)
    for start, end, size in found:
        assert end - start >= size / 4000.0 * (1 - 1e-9)


def ends_of(flows: list[tuple[float, float]], *, alone: bool) -> list[float]:
    """When each of (start, size) has passed a link of 4 bytes per second."""
    events: list[tuple[float, int, Flow | None, int]] = []
    ends = [math.nan] * len(flows)
    order = itertools.count(len(flows))

    def schedule(time: float, flow: Flow, epoch: int) -> None:
        heapq.heappush(events, (time, next(order), flow, epoch))

    share = FairShare(schedule)
    share.add("link", 4.0, alone=alone)
    for number, (at, _) in enumerate(flows):
        heapq.heappush(events, (at, number, None, 0))
    while events:
        now, number, flow, epoch = heapq.heappop(events)
        if flow is None:
            done = partial(ends.__setitem__, number)
            share.start(("link",), flows[number][1], now, done)
        elif flow.epoch == epoch:
            share.end(flow, now)
    return ends


@given(st.lists(st.tuples(st.floats(0.0, 2.0), st.floats(0.1, 9.0)), min_size=1, max_size=12))
def test_a_link_used_alone_is_shared_as_any_other(flows: list[tuple[float, float]]) -> None:
    expected = ends_of(flows, alone=False)
    assert ends_of(flows, alone=True) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_flows_that_share_nothing_keep_their_rates() -> None:
    """A change is felt by those that links connect to it, and by nobody else."""
    changed: list[Flow] = []
    share = FairShare(lambda time, flow, epoch: changed.append(flow))
    for link in "abc":
        share.add(link, 1.0)
    for links in (("a", "b"), ("c",), ("b",)):
        share.start(links, 8.0, 0.0, lambda now: None)
    first, apart, *rest = changed
    assert first.links == ("a", "b")
    assert apart.links == ("c",)
    assert [flow.links for flow in rest] == [("a", "b"), ("b",)]
    assert (first.rate, apart.rate) == (0.5, 1.0)


# -- several links


flows_on = st.lists(
    st.sets(st.integers(0, 3), min_size=1, max_size=3).map(tuple), min_size=1, max_size=8
)


@given(flows_on, st.lists(st.floats(0.5, 20.0), min_size=4, max_size=4))
def test_rates_are_max_min_fair(links: list[tuple[int, ...]], capacity: list[float]) -> None:
    """No link is overfull, and every flow has a full link where nobody is faster than it."""
    flows = [Flow(own, 1.0, 0.0, lambda now: None) for own in links]
    rates = fair_rates(flows, dict(enumerate(capacity)))
    load = [sum(rates[f] for f in flows if link in f.links) for link in range(4)]
    assert all(used <= room * (1 + 1e-9) for used, room in zip(load, capacity, strict=True))
    for flow in flows:
        bottlenecks = [
            link for link in flow.links
            if load[int(str(link))] >= capacity[int(str(link))] * (1 - 1e-9)
            and rates[flow] >= max(rates[f] for f in flows if link in f.links) * (1 - 1e-9)
        ]  # fmt: skip
        assert bottlenecks


def test_on_a_path_latencies_add_and_the_smallest_bandwidth_rules() -> None:
    links = {("a", "switch"): Level(100.0, 1.0, 0.5), ("switch", "b"): Level(200.0, 2.0)}
    clients = hosts(0, 0)
    coordinator = run([request(0, 0.0, 25, chain=HOP)], clients, network=Network(direct=links))
    assert moves(coordinator) == [(0.0, pytest.approx(3.0 + 100 / 50), 100.0)]


def test_distance_decides_on_the_link() -> None:
    inside, between, racks = PRESETS["h100"]
    network = Network(inside, between, racks)
    a, b, c, d = hosts(0, 0, 1, 9)
    clients = [a, b, c, d]
    d.place = Place(9, 1)
    run([], clients, network=network)
    for target, level in ((b, inside), (c, between), (d, racks)):
        path = network.path(a, target)
        assert path is not None
        assert (path.rate, path.latency) == (level.bandwidth * level.efficiency, level.latency)
    own = network.path(a, a)
    assert own is not None
    assert own.rate == math.inf


def test_published_links() -> None:
    assert PRESETS["h100"] == (
        Level(450e9, 10e-6, 0.65), Level(50e9, 20e-6, 0.9), Level(12.5e9, 200e-6, 0.6),
    )  # fmt: skip
    assert PRESETS["a100"][2] == Level(6.25e9, 200e-6, 0.6)


def test_the_two_ends_of_a_node_are_not_one_link() -> None:
    """What leaves a node does not slow what enters it."""
    clients = hosts(0, 1)
    back: Chain = (Stage("postprocess", task="b"), Stage("preprocess", task="a"))
    requests = [request(0, 0.0, 1000, chain=HOP), request(1, 0.0, 1000, chain=back)]
    network = Network(node_to_node=Level(4000.0), shared=True)
    found = by_request(run(requests, clients, network=network))
    np.testing.assert_allclose(found["end"], [1.0, 1.0])


# -- bytes


def sizes_of(chain: Chain, clients: list[Client], sizes: Sizes | None = None, **fields: Any) -> Any:
    coordinator = run([request(0, 0.0, 100, 5, chain, **fields)], clients,
                      network=Network(Level(1e9)), sizes=sizes)  # fmt: skip
    return list(coordinator.transfers.table()["bytes"])


def test_bytes_of_each_transition() -> None:
    pair: list[Client] = [llm(role, role=role, options={"kv_bytes": 3000.0})
                          for role in ("prefill", "decode")]  # fmt: skip
    assert sizes_of((Stage("prefill"), Stage("decode")), pair) == [100 * 3000.0]
    store = StorageClient("store", levels=[StorageLevel(1e9, hit=1.0)], mode="sampled",
                          kv_bytes=1.0)  # fmt: skip
    gpu: list[Client] = [store, llm(options={"kv_bytes": 3000.0})]
    chain = (Stage("kv_retrieval"), Stage("prefill"), Stage("decode"))
    assert sizes_of(chain, gpu, context=40) == [40 * 3000.0]
    there_and_back: Chain = (Stage("preprocess", task="a"), Stage("prefill"), Stage("decode"),
                             Stage("postprocess", task="a"))  # fmt: skip
    assert sizes_of(there_and_back, [hosts(0)[0], llm()]) == [4 * 100, 4 * (100 + 5)]
    clients = [hosts(0)[0], llm()]
    assert sizes_of(there_and_back, clients, Sizes(token=6)) == [6 * 100, 6 * 105]


def test_layers_that_left_during_the_prefill_need_no_waiting() -> None:
    """max(bytes / L, bytes - rate · time · (L - 1) / L), then the latency."""
    assert visible_bytes(1000.0, 10.0, 10, overlap=20.0) == 1000 - 10 * 20 * 0.9
    assert visible_bytes(1000.0, 100.0, 10, overlap=20.0) == 1000 / 10
    cost = AffineCost(prefill_token=0.01)
    clients = [llm(role, role=role, cost=cost, options={"kv_bytes": 80.0})
               for role in ("prefill", "decode")]  # fmt: skip
    network = Network(Level(4000.0, 0.5))
    coordinator = run([request(0, 0.0, 100, 2)], clients, network=network,
                      sizes=Sizes(layers={"m": 4}))  # fmt: skip
    ((start, end, size),) = moves(coordinator)
    assert size == max(8000 / 4, 8000 - 4000 * 1.0 * 3 / 4)
    assert (start, end) == (1.0, pytest.approx(1.0 + size / 4000 + 0.5))


def test_figures_of_links() -> None:
    system = System.parse({
        "clients": [{"kind": "host", "name": n, "tasks": {n: {"seconds": 0.5}}} for n in "ab"],
        "network": {"links": [{"between": ["a", "b"], "bandwidth": 400.0}], "sharing": True},
        "workloads": [{"requests": 4, "arrivals": {"kind": "regular", "rate": 1}, "prompt": 25,
                       "output": 1, "chain": [{"kind": "preprocess", "task": "a"},
                                              {"kind": "postprocess", "task": "b"}]}],
    })  # fmt: skip
    result = system.simulate()
    link = result.links["a -> b"]
    assert link["bytes"] == 4 * 100
    assert link["utilisation"] == pytest.approx(4 * 0.25 / result.seconds)


# -- inside a client


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_collectives(devices: int) -> None:
    size, rate, latency = 3e6, 450e9, 2e-6
    share = (devices - 1) / devices
    both = all_reduce(devices, size, rate, latency)
    assert both == pytest.approx(
        5e-6 + 2 * (devices - 1) * latency + 2 * share * size / rate, rel=1e-12
    )
    once = all_gather(devices, size, rate, latency)
    assert once == pytest.approx(5e-6 + (devices - 1) * latency + share * size / rate, rel=1e-12)
    assert point_to_point(size, rate, latency) == latency + size / rate


def test_nothing_to_move_takes_no_time() -> None:
    assert all_reduce(1, 1e9, 1.0, 1.0) == all_gather(1, 1e9, 1.0, 1.0) == 0.0
    assert all_reduce(8, 0, 1.0, 1.0) == all_gather(8, 0, 1.0, 1.0) == 0.0
    assert point_to_point(0, 1.0, 1.0) == 0.0
