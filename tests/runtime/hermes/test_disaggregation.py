"""Prefill and decode on clients of their own: hand-over, its memory, global and local pairs."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest

from fxgraft.errors import InputError
from fxgraft.runtime.hermes import System
from fxgraft.runtime.hermes.coordinator import Coordinator
from fxgraft.runtime.hermes.llm.scheduler import Strategy
from fxgraft.runtime.hermes.network import Level, Network
from tests.runtime.hermes._systems import by_request, draw_requests, llm, request, run

COST = {"base": 0.01, "prefill_token": 5e-5, "sequence": 5e-4, "context": 1e-6}


def pair(**limits: Any) -> list[Any]:
    return [llm(role, role=role, **limits) for role in ("prefill", "decode")]


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_one_request_without_transfer_is_as_on_one_client(strategy: str) -> None:
    apart = by_request(run([request(0, 0.0, 300, 40)], pair(strategy=strategy)))
    together = by_request(run([request(0, 0.0, 300, 40)], [llm(strategy=strategy)]))
    for column in ("first_token", "end", "max_gap", "emitted"):
        np.testing.assert_allclose(apart[column], together[column], rtol=1e-12)


def test_blocks_are_held_until_the_transfer_ends() -> None:
    """16 blocks are one prompt of 250 tokens: the second waits for the first one's transfer."""
    clients = pair(blocks=16)
    clients[1] = llm("decode", role="decode", options={"kv_bytes": 100.0})
    clients[0].kv_bytes = 100.0
    network = Network(Level(25_000.0))  # one second for a prompt
    coordinator = run([request(i, 0.0, 250, 5) for i in range(2)], clients, network=network)
    stages = coordinator.stages.table()
    prefills = np.flatnonzero(stages["stage"] == 0)
    first, second = sorted(prefills, key=lambda row: stages["ended"][row])
    assert stages["started"][second] == pytest.approx(stages["ended"][first] + 1.0)
    assert by_request(coordinator)["transfer_seconds"] == pytest.approx([1.0, 1.0])


def test_a_request_of_one_token_is_not_handed_over() -> None:
    coordinator = run([request(0, 0.0, 100, 1)], pair())
    assert by_request(coordinator)["emitted"] == [1]
    assert coordinator.clients[1].steps_run == 0


def fleet(disaggregation: str, **changes: Any) -> System:
    """Two nodes with a prefill and a decode client each; node 0 gets twice the requests."""
    return System.parse({
        "clients": [
            {"name": f"{role}-{node}", "role": role, "node": node, "cost": COST, "kv_bytes": 1000.0}
            for node in range(2) for role in ("prefill", "decode")
        ],
        "network": {"inside_node": {"bandwidth": 1e9}, "node_to_node": {"bandwidth": 1e8}},
        "routing": {"disaggregation": disaggregation, "decode": {"policy": "load"}},
        "workloads": [{"requests": 200, "arrivals": {"rate": 20}, "prompt": 200, "output": 20}],
        **changes,
    })  # fmt: skip


def hops(system: System) -> Counter[tuple[int, int]]:
    coordinator: Coordinator = system.coordinator()
    coordinator.run()
    table = coordinator.transfers.table()
    nodes = [client.place.node for client in coordinator.clients]
    return Counter(
        (nodes[int(a)], nodes[int(b)])
        for a, b in zip(table["source"], table["target"], strict=True)
    )


def test_global_pairs_cross_nodes_and_local_ones_do_not() -> None:
    anywhere, at_home = hops(fleet("global")), hops(fleet("local"))
    assert anywhere[0, 1] + anywhere[1, 0] > 0
    assert set(at_home) == {(0, 0), (1, 1)}
    assert sum(anywhere.values()) == sum(at_home.values()) == 200


def test_local_pairs_need_a_partner_on_every_node() -> None:
    clients = [
        {"name": "p0", "role": "prefill", "node": 0, "cost": COST},
        {"name": "p1", "role": "prefill", "node": 1, "cost": COST},
        {"name": "d0", "role": "decode", "node": 0, "cost": COST},
    ]
    with pytest.raises(InputError, match="'p1' hands over inside its node only"):
        fleet("local", clients=clients).check()


def test_more_decode_clients_share_the_decodes() -> None:
    """The random requests of the published shape 2P/6D complete, on each of their clients."""
    random = np.random.default_rng(3)
    clients = [llm(f"p{i}", role="prefill", strategy="continuous") for i in range(2)]
    clients += [llm(f"d{i}", role="decode", strategy="continuous") for i in range(6)]
    coordinator = run(draw_requests(random, 120, rate=40.0), clients)
    assert coordinator.ended["completed"] == 120
    assert all(client.served for client in coordinator.clients)
    found = by_request(coordinator)
    np.testing.assert_array_equal(found["emitted"], found["output"])
    assert all(client.scheduler.pool.used == 0 for client in clients)


def test_a_preempted_decode_is_computed_again_where_it_decodes() -> None:
    clients = [llm("p", role="prefill"), llm("d", role="decode", blocks=14)]
    coordinator = run([request(i, 0.0, 60, 60) for i in range(3)], clients)
    found = by_request(coordinator)
    assert coordinator.ended["completed"] == 3
    assert found["preemptions"].sum() > 0
    assert found["recomputed"].sum() > 0
    prefills = coordinator.steps.table()
    again = prefills["prefill_tokens"][prefills["client"] == 1]
    assert again.sum() > 0
