"""Closed forms of queueing theory, Little's law, and other people's simulators as oracles."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest

from fxgraft.runtime.hermes import System
from fxgraft.runtime.hermes.results.metrics import number_in_system
from fxgraft.runtime.hermes.results.result import Result

MANY = 200_000
BATCHES = 40


def host_system(
    rate: float, mean: float, law: str, *, cores: int = 1, requests: int = MANY, seed: int = 0
) -> System:
    """Poisson arrivals at one host."""
    return System.parse({
        "seed": seed,
        "clients": [{"kind": "host", "name": "host", "cores": cores,
                     "tasks": {"default": {"seconds": mean, "law": law}}}],
        "workloads": [{"requests": requests, "arrivals": {"rate": rate}, "prompt": 1, "output": 1,
                       "chain": ["preprocess"]}],
    })  # fmt: skip


def waits(result: Result) -> Any:
    """Seconds between arrival and start, by order of arrival."""
    stages = result.tables["stages"]
    return (stages["started"] - stages["assigned"])[np.argsort(stages["request"])]


def erlang_c(servers: int, load: float) -> float:
    """Probability that a request waits."""
    terms = [load**k / math.factorial(k) for k in range(servers)]
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(terms) + last)


def assert_mean(values: Any, expected: float) -> None:
    """Within 3 standard errors, from means of batches, and within 2 %."""
    values = values[len(values) // 20 :]  # the start is empty
    means = np.array([part.mean() for part in np.array_split(values, BATCHES)])
    error = means.std(ddof=1) / math.sqrt(BATCHES)
    assert abs(values.mean() - expected) <= 3 * error
    assert values.mean() == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_constant_service_waits_as_in_an_m_d_1_queue() -> None:
    result = host_system(0.8, 1.0, "constant", requests=4 * MANY).simulate()
    assert_mean(waits(result), 0.8 / (2 * (1 - 0.8)))
    assert result.summary["total"]["e2e"]["mean"] == pytest.approx(3.0, rel=0.02)


@pytest.mark.slow
def test_exponential_service_stays_as_long_as_in_an_m_m_1_queue() -> None:
    result = host_system(0.8, 1.0, "exponential", requests=5 * MANY).simulate()
    requests = result.requests
    sojourn = (requests["end"] - requests["arrival"])[np.argsort(requests["request"])]
    assert_mean(sojourn, 5.0)


@pytest.mark.slow
def test_several_servers_wait_by_erlang_c() -> None:
    result = host_system(1.6, 1.0, "exponential", cores=2, requests=5 * MANY).simulate()
    waited = waits(result)
    assert erlang_c(2, 1.6) == pytest.approx(0.7111, abs=1e-4)
    assert_mean((waited > 0).astype(float), erlang_c(2, 1.6))
    assert_mean(waited, erlang_c(2, 1.6) / (2 - 1.6))


@pytest.mark.parametrize("cores", [1, 3])
def test_utilisation_is_the_offered_work(cores: int) -> None:
    result = host_system(0.7 * cores, 1.0, "exponential", cores=cores, requests=60_000).simulate()
    assert result.clients[0]["utilisation"] == pytest.approx(0.7, rel=0.01)


def test_littles_law_holds_exactly_on_the_log() -> None:
    result = host_system(1.5, 1.0, "exponential", cores=2, requests=20_000).simulate()
    requests, stages, seconds = result.requests, result.tables["stages"], result.seconds
    number = number_in_system(requests["arrival"], requests["end"], seconds)
    rate, sojourn = len(requests["end"]) / seconds, requests["end"] - requests["arrival"]
    assert number == pytest.approx(rate * sojourn.mean(), rel=1e-9)
    here = number_in_system(stages["assigned"], stages["ended"], seconds)
    assert here == pytest.approx(number, rel=1e-9)


@pytest.mark.slow
def test_littles_law_holds_with_the_offered_rate_on_a_long_run() -> None:
    """The rate is the configuration's, not the log's; clients of one tandem and the whole."""
    system = System.parse({
        "clients": [
            {"kind": "host", "name": name, "cores": cores,
             "tasks": {name: {"seconds": mean, "law": "exponential"}}}
            for name, cores, mean in (("a", 1, 0.5), ("b", 2, 1.0))
        ],
        "workloads": [{"requests": 200_000, "arrivals": {"rate": 1.2}, "prompt": 1, "output": 1,
                       "chain": [{"kind": "preprocess", "task": "a"},
                                 {"kind": "postprocess", "task": "b"}]}],
    })  # fmt: skip
    result = system.simulate()
    stages, seconds = result.tables["stages"], result.seconds
    for client in (0.0, 1.0):
        own = stages["client"] == client
        start, end = stages["assigned"][own], stages["ended"][own]
        number = number_in_system(start, end, seconds)
        assert number == pytest.approx(1.2 * (end - start).mean(), rel=0.01)
    requests = result.requests
    number = number_in_system(requests["arrival"], requests["end"], seconds)
    assert number == pytest.approx(1.2 * result.summary["total"]["e2e"]["mean"], rel=0.01)


def test_two_clients_by_turns_are_one_at_half_the_rate() -> None:
    def ends(count: int, rate: float, requests: int) -> Any:
        system = System.parse({
            "clients": [{"name": "gpu", "count": count, "cost": {"base": 0.02, "context": 1e-5},
                         "max_sequences": 8, "max_batched_tokens": 64}],
            "workloads": [{"requests": requests, "arrivals": {"kind": "regular", "rate": rate},
                           "prompt": 50, "output": 7}],
        })  # fmt: skip
        requests_log = system.simulate().requests
        return np.sort(requests_log["end"] - requests_log["arrival"])

    np.testing.assert_allclose(ends(2, 20.0, 400)[::2], ends(1, 10.0, 200), rtol=1e-9)


def test_the_slower_of_two_stages_bounds_the_throughput() -> None:
    system = System.parse({
        "clients": [{"kind": "host", "name": name, "tasks": {name: {"seconds": mean}}}
                    for name, mean in (("fast", 0.01), ("slow", 0.025))],
        "workloads": [{"requests": 1000, "arrivals": {"kind": "regular", "rate": 1e6}, "prompt": 1,
                       "output": 1, "chain": [{"kind": "preprocess", "task": "fast"},
                                              {"kind": "postprocess", "task": "slow"}]}],
    })  # fmt: skip
    ends = np.sort(system.simulate().requests["end"])
    np.testing.assert_allclose(np.diff(ends), 0.025, rtol=1e-9)


def simpy_sojourns(arrivals: list[float], services: list[float], cores: int) -> list[float]:
    """A c-server queue in SimPy, for given arrivals and service times."""
    simpy: Any = pytest.importorskip("simpy")
    environment = simpy.Environment()
    servers = simpy.Resource(environment, cores)
    found = [0.0] * len(arrivals)

    def customer(index: int) -> Generator[Any, Any, None]:
        yield environment.timeout(arrivals[index])
        with servers.request() as turn:
            yield turn
            yield environment.timeout(services[index])
        found[index] = environment.now - arrivals[index]

    for index in range(len(arrivals)):
        environment.process(customer(index))
    environment.run()
    return found


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_the_same_requests_take_as_long_as_in_simpy(cores: int) -> None:
    """Service times differ from request to request by the lengths of prompts."""
    system = System.parse({
        "clients": [{"kind": "host", "name": "host", "cores": cores,
                     "tasks": {"default": {"per_prompt_token": 0.01}}}],
        "workloads": [{"requests": 3000, "arrivals": {"rate": 0.9 * cores},
                       "prompt": {"kind": "uniform", "low": 1, "high": 200}, "output": 1,
                       "chain": ["preprocess"]}],
    })  # fmt: skip
    requests = system.simulate().requests
    order = np.argsort(requests["request"])
    arrivals, prompts = requests["arrival"][order], requests["prompt"][order]
    expected = simpy_sojourns(arrivals.tolist(), (prompts * 0.01).tolist(), cores)
    found = (requests["end"] - requests["arrival"])[order]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_mean_wait_agrees_with_ciw() -> None:
    ciw: Any = pytest.importorskip("ciw")
    network = ciw.create_network(
        arrival_distributions=[ciw.dists.Exponential(rate=1.6)],
        service_distributions=[ciw.dists.Exponential(rate=1.0)],
        number_of_servers=[2],
    )
    ciw.seed(1)
    simulation = ciw.Simulation(network)
    simulation.simulate_until_max_time(20_000)
    theirs = np.array([record.waiting_time for record in simulation.get_all_records()])
    ours = waits(host_system(1.6, 1.0, "exponential", cores=2, requests=200_000).simulate())
    assert ours.mean() == pytest.approx(theirs.mean(), rel=0.15)


def decode_steps(cost: Callable[[int], float], prompts: list[int], outputs: list[int]) -> float:
    """Static batching written out: a batch is prefilled, then decoded until all have ended."""
    left, now = dict(enumerate(outputs)), cost(sum(prompts))
    left = {i: n - 1 for i, n in left.items() if n > 1}
    while left:
        now += cost(len(left))
        left = {i: n - 1 for i, n in left.items() if n > 1}
    return now


def test_utilisation_of_a_language_model_is_the_work_of_its_steps() -> None:
    system = System.parse({
        "clients": [{"name": "gpu", "batching": "static", "cost": {"base": 0.01},
                     "max_batched_tokens": 4096}],
        "workloads": [{"requests": 64, "arrivals": {"kind": "regular", "rate": 1e9}, "prompt": 10,
                       "output": [3, 9, 27]}],
    })  # fmt: skip
    result = system.simulate()
    requests = result.requests
    order = np.argsort(requests["request"])
    outputs = requests["output"][order].astype(int).tolist()
    # The first request is alone, the other 63 are one batch.
    expected = decode_steps(lambda n: 0.01, [10], outputs[:1])
    expected += decode_steps(lambda n: 0.01, [10] * 63, outputs[1:])
    assert result.clients[0]["busy_seconds"] == pytest.approx(expected, rel=1e-9)
    assert result.seconds == pytest.approx(expected, rel=1e-6)
