"""Storage of prior context: expected times, draws, contents with eviction, shared levels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxgraft.runtime.hermes import System
from fxgraft.runtime.hermes.costs import AffineCost
from fxgraft.runtime.hermes.hierarchy import StorageLevel, Store, expected_seconds
from fxgraft.runtime.hermes.results.result import Result
from fxgraft.runtime.hermes.stages import Chain, Stage
from fxgraft.runtime.hermes.storage import Sharing, StorageClient
from tests.runtime.hermes._systems import by_request, request, run

# The worked example of the specification: 4,096 tokens of a model of 70 billion parameters.
TOKENS, KV_BYTES = 4096, 327_680
LEVELS = [
    StorageLevel(3000e9, 1e-6, 0.2),
    StorageLevel(128e9, 0.1e-3, 0.5),
    StorageLevel(2e9, 2e-3, 0.9),
]
AGAIN = 0.9
LOOKUP: Chain = (Stage("kv_retrieval"),)
probabilities = st.floats(0.0, 1.0)


def storage(levels: list[StorageLevel] = LEVELS, **options: Any) -> StorageClient:
    return StorageClient("storage", levels=levels, kv_bytes=KV_BYTES, **options)


def lookup(index: int, arrival: float, key: int, context: int = TOKENS) -> Any:
    return request(index, arrival, 1, chain=LOOKUP, key=key, context=context)


@pytest.mark.parametrize(
    ("again", "probes", "milliseconds"),
    [(AGAIN, False, 282.636), (0.0, False, 246.636), (AGAIN, True, 282.757)],
)
def test_worked_example(again: float, probes: bool, milliseconds: float) -> None:
    seconds = expected_seconds(LEVELS, TOKENS * KV_BYTES, again, charge_probes=probes)
    assert 1e3 * seconds == pytest.approx(milliseconds, abs=5e-4)


def test_certain_hits_and_misses() -> None:
    level = StorageLevel(5e9, 3e-3, 1.0)
    assert expected_seconds([level, *LEVELS], 1e9, 7.0) == 3e-3 + 1e9 / 5e9
    never = [StorageLevel(each.bandwidth, each.latency) for each in LEVELS]
    assert expected_seconds(never, 1e9, 7.0) == 7.0


@given(st.integers(0, 2), st.floats(1.0, 4.0), probabilities)
def test_expectation_is_monotone(place: int, factor: float, more: float) -> None:
    """Faster levels and more hits never take longer, where each level beats what follows it."""
    size = 1e9
    before = expected_seconds(LEVELS, size, AGAIN)
    level = LEVELS[place]
    faster = StorageLevel(level.bandwidth * factor, level.latency, level.hit)
    surer = StorageLevel(level.bandwidth, level.latency, level.hit + (1 - level.hit) * more)
    for changed in (faster, surer):
        levels = [*LEVELS[:place], changed, *LEVELS[place + 1 :]]
        assert expected_seconds(levels, size, AGAIN) <= before * (1 + 1e-12)


@pytest.mark.parametrize("probes", [False, True])
def test_draws_have_the_expected_mean(probes: bool) -> None:
    again = AffineCost(base=AGAIN)
    client = storage(mode="sampled", recompute=again, charge_probes=probes, seed=(7,))
    one = lookup(0, 0.0, 1)
    times = np.array([client.duration([one]) for _ in range(100_000)])
    expected = expected_seconds(LEVELS, TOKENS * KV_BYTES, AGAIN, charge_probes=probes)
    assert abs(times.mean() - expected) <= 3 * times.std() / math.sqrt(len(times))
    assert len(set(np.round(times, 9))) == 4  # three levels and a miss: there is a tail
    assert sum(client.hits) == len(times)


def test_a_store_forgets_what_was_used_longest_ago() -> None:
    store = Store(capacity=10.0)
    store.put(1, 4.0)
    store.put(2, 4.0)
    assert store.has(1, 4.0)
    store.put(3, 4.0)  # 2 leaves
    assert (store.has(1, 4.0), store.has(2, 4.0), store.has(3, 4.0)) == (True, False, True)
    assert not store.has(3, 5.0)  # less is there than wanted
    store.put(1, 7.0)  # grows: 3 leaves
    assert list(store.sizes) == [1]
    store.put(4, 11.0)  # larger than the store
    assert list(store.sizes) == [1]
    assert store.used == 7.0


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0.5, 12.0)), max_size=60))
def test_a_store_is_never_overfull(entries: list[tuple[int, float]]) -> None:
    store = Store(capacity=10.0)
    for key, size in entries:
        store.has(key, size)
        store.put(key, size)
        assert store.used <= store.capacity
        assert store.used == pytest.approx(sum(store.sizes.values()), abs=1e-9)
        assert (key in store.sizes) == (size <= store.capacity)


def test_contents_hit_and_leave() -> None:
    """Room for two contexts: 3 makes 2 leave, so that its second lookup misses."""
    level = StorageLevel(1e9, 0.0, capacity=2.5 * TOKENS * KV_BYTES)
    client = storage([level], mode="contents")
    keys = [1, 2, 1, 3, 1, 2]
    found = by_request(run([lookup(i, 10.0 * i, key) for i, key in enumerate(keys)], [client]))
    seconds = found["end"] - found["arrival"]
    hit = TOKENS * KV_BYTES / 1e9
    np.testing.assert_allclose(seconds, [0, 0, hit, 0, hit, 0], rtol=1e-9)
    assert client.hits == [2, 4]


def test_a_hit_below_fills_the_levels_above() -> None:
    small = StorageLevel(100e9, 0.0, capacity=1.5 * TOKENS * KV_BYTES)
    client = storage([small, StorageLevel(1e9)], mode="contents")
    keys = [1, 2, 1, 1]  # 2 displaces 1 in the small level only
    found = by_request(run([lookup(i, 10.0 * i, key) for i, key in enumerate(keys)], [client]))
    size = TOKENS * KV_BYTES
    expected = [0, 0, size / 1e9, size / 100e9]
    np.testing.assert_allclose(found["end"] - found["arrival"], expected, rtol=1e-9)
    assert client.hits == [1, 1, 2]


def test_a_context_is_there_when_its_first_lookup_has_ended() -> None:
    """Two lookups of one key in the same step both miss."""
    client = storage([StorageLevel(1e9)], mode="contents", recompute=AffineCost(base=1.0))
    requests = [lookup(i, arrival, 1) for i, arrival in enumerate((0.0, 0.0, 0.5, 5.0))]
    run(requests, [client])
    # Two in the step that ends at 1 s, and two after it.
    assert client.hits == [2, 2]


@pytest.mark.parametrize(
    ("sharing", "ends", "busy"), [(False, (1, 2), 2), (True, (1.5, 2), 2), ("own", (1, 1.5), 1.5)]
)
def test_lookups_at_one_time_share_a_level(
    sharing: Sharing, ends: tuple[float, float], busy: float
) -> None:
    level = StorageLevel(1e9, 0.0, 1.0)
    client = storage([level], mode="sampled", sharing=sharing)
    one = TOKENS * KV_BYTES / 1e9
    # The first is alone for half of its time, then both have half of the bandwidth.
    found = by_request(run([lookup(0, 0.0, 1), lookup(1, one / 2, 2)], [client]))
    np.testing.assert_allclose(found["end"], [end * one for end in ends], rtol=1e-9)
    assert client.busy_seconds == pytest.approx(busy * one)


def serve(folder: Path, keys: list[int], **storage_fields: Any) -> Result:
    """A prompt of 10 tokens behind 90 tokens of prior context, one request at a time."""
    rows = [f"{10.0 * i},10,1,90,{key}" for i, key in enumerate(keys)]
    trace = folder / "trace.csv"
    trace.write_text("\n".join(["arrival,prompt,output,context,key", *rows]) + "\n")
    return System.parse({
        "clients": [
            {"kind": "storage", "name": "store", "kv_bytes": 1000.0,
             "levels": [{"bandwidth": 1e6, "latency": 0.25}], **storage_fields},
            {"name": "gpu", "cost": {"prefill_token": 0.01, "cached_token": 0.001}},
        ],
        "workloads": [{"arrivals": str(trace), "chain": ["kv_retrieval", "prefill", "decode"]}],
    }).simulate()  # fmt: skip


def test_found_context_is_not_computed_again(tmp_path: Path) -> None:
    result = serve(tmp_path, [7, 7])
    requests = result.requests
    # First all 100 tokens are computed; then 90 are read (0.25 s + 90 KB at 1 MB/s) and attended.
    expected = [1.0, 0.25 + 0.09 + 10 * 0.01 + 90 * 0.001]
    np.testing.assert_allclose(requests["end"] - requests["arrival"], expected, rtol=1e-9)
    assert result.clients[0]["hits_by_level"] == [1, 1]
    assert list(requests["prompt"]) == [10, 10]


def test_context_that_storage_recomputes_is_not_prefilled(tmp_path: Path) -> None:
    result = serve(tmp_path, [1, 2], recompute={"prefill_token": 0.005}, mode="contents")
    requests = result.requests
    expected = 90 * 0.005 + 10 * 0.01 + 90 * 0.001
    np.testing.assert_allclose(requests["end"] - requests["arrival"], expected, rtol=1e-9)


def test_the_expectation_is_the_same_for_all(tmp_path: Path) -> None:
    result = serve(tmp_path, [1, 1, 1], recompute={"prefill_token": 0.005}, mode="expectation",
                   levels=[{"bandwidth": 1e6, "hit": 0.5}])  # fmt: skip
    requests = result.requests
    expected = 0.5 * 0.09 + 0.5 * 90 * 0.005 + 10 * 0.01 + 90 * 0.001
    np.testing.assert_allclose(requests["end"] - requests["arrival"], expected, rtol=1e-9)


def test_replicas_share_levels_as_configured() -> None:
    system = System.parse({
        "clients": [{"kind": "storage", "name": "store", "count": 4, "kv_bytes": 1.0,
                     "levels": [{"bandwidth": 1.0}, {"bandwidth": 1.0, "shared_by": 2}]}],
        "workloads": [{"requests": 1, "arrivals": {"rate": 1}, "prompt": 1, "output": 1,
                       "context": 5, "chain": ["kv_retrieval"]}],
    })  # fmt: skip
    stores = [c.stores for c in system.build_clients() if isinstance(c, StorageClient)]
    assert len({id(own) for own, _ in stores}) == 4
    assert [id(shared) for _, shared in stores[::2]] == [id(shared) for _, shared in stores[1::2]]
    assert stores[0][1] is not stores[2][1]


def test_a_shared_level_knows_what_a_neighbour_stored() -> None:
    def hits(shared_by: int) -> list[list[int]]:
        level = {"bandwidth": 1.0, "shared_by": shared_by}
        result = System.parse({
            "clients": [{"kind": "storage", "name": "store", "count": 2, "kv_bytes": 1.0,
                         "levels": [level]}],
            "workloads": [{"requests": 2, "arrivals": {"kind": "regular", "rate": 0.01},
                           "prompt": 1, "output": 1, "context": 5,
                           "keys": {"law": "uniform", "count": 1}, "chain": ["kv_retrieval"]}],
        }).simulate()  # fmt: skip
        return [client["hits_by_level"] for client in result.clients]

    assert hits(shared_by=2) == [[0, 1], [1, 0]]
    assert hits(shared_by=1) == [[0, 1], [0, 1]]
