"""Retrieval: the cost of a search, and stages that make prompts longer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fxgraft.runtime.hermes import System
from fxgraft.runtime.hermes.costs import AffineCost
from fxgraft.runtime.hermes.ivf_pq import IvfPq, hnsw_memory
from fxgraft.runtime.hermes.network import Level, Network
from fxgraft.runtime.hermes.rag import RagClient
from fxgraft.runtime.hermes.stages import Stage
from tests.runtime.hermes._systems import by_request, llm, request, run

# The worked example of the specification.
INDEX = IvfPq(768, 4_000_000, 50, 5_000, 64, 4e12, 400e9, candidates=20)
EMBED = AffineCost(base=1e-3, prefill_token=1e-5)
RANK = AffineCost(base=2e-3, prefill_token=1e-6)


def test_worked_example() -> None:
    phases = INDEX.phases()
    assert 1e3 * phases["coarse"].operations / 4e12 == pytest.approx(1.536)
    assert 1e3 * phases["coarse"].bytes / 400e9 == pytest.approx(30.72, rel=1e-6)
    assert 1e3 * phases["scan"].operations / 4e12 == pytest.approx(0.004)
    tables, codebook = 2 * 256 * 64 * 4, 256 * 768 * 4
    lists = 50 * 5_000 * 64 + 4 * 20
    assert phases["scan"].bytes == lists + tables + codebook
    assert phases["rerank"].operations == 2 * 768 * 20
    assert phases["rerank"].bytes == 4 * 20 * 768 + 4 * 20
    times = [(p.operations / 4e12, p.bytes / 400e9) for p in phases.values()]
    assert INDEX.seconds() == pytest.approx(sum(map(sum, times)), rel=1e-12)
    assert replace(INDEX, overlap=True).seconds() == pytest.approx(sum(map(max, times)))


def test_centroids_stream_once_per_batch_and_lists_per_query() -> None:
    one, eight = INDEX.phases(1), INDEX.phases(8)
    assert eight["coarse"].operations == 8 * one["coarse"].operations
    centroids = 4 * 4_000_000 * 768
    assert eight["coarse"].bytes - centroids == 8 * (one["coarse"].bytes - centroids)
    codebook = 256 * 768 * 4
    assert eight["scan"].bytes - codebook == 8 * (one["scan"].bytes - codebook)
    assert replace(INDEX, probes=100).phases()["scan"].operations == 2 * one["scan"].operations


def test_two_levels_of_centroids_remove_the_stream() -> None:
    grouped = replace(INDEX, groups=2000, group_probes=20)
    assert grouped.seconds() < INDEX.seconds() / 20
    assert grouped.phases()["coarse"].operations == 2 * 768 * (2000 + 20 * 2000)


def test_memory_of_indices() -> None:
    vectors = 4_000_000 * 5_000
    expected = 1.1 * (vectors * (64 + 24) + 4 * 4_000_000 * 768 + 256 * 4 * 768)
    assert INDEX.memory == pytest.approx(expected)
    half = replace(INDEX, code_bits=4)
    assert half.memory == pytest.approx(
        1.1 * (vectors * (32 + 24) + 4 * 4_000_000 * 768 + 16 * 4 * 768)
    )
    assert hnsw_memory(768, 32, 1000) == pytest.approx(1.1 * (4 * 768 + 8 * 32) * 1000)


def test_a_rag_stage_adds_up_and_lengthens_the_prompt() -> None:
    link = Level(32e9, 1e-5)
    client = RagClient("rag", embed=EMBED, index=INDEX, rerank=RANK, vector_link=link)
    chain = (Stage("rag", docs=20, tokens_per_doc=512), Stage("prefill"), Stage("decode"))
    gpu = llm(cost=AffineCost(prefill_token=1e-5), max_batched_tokens=1 << 14)
    found = by_request(run([request(0, 0.0, 100, 1, chain)], [client, gpu]))
    embed, move = 1e-3 + 100 * 1e-5, 1e-5 + 4 * 768 / 32e9
    rank, prefill = 2e-3 + 20 * 512 * 1e-6, (100 + 20 * 512) * 1e-5
    expected = embed + move + INDEX.seconds() + rank + prefill
    assert found["end"][0] == pytest.approx(expected, rel=1e-12)
    assert found["prompt"][0] == 100


def test_requests_that_wait_are_searched_together() -> None:
    client = RagClient("rag", index=INDEX, batch=4)
    chain = (Stage("retrieve", docs=1, tokens_per_doc=10),)
    requests = [request(i, 0.0 if i == 0 else 1e-3, 5, 1, chain) for i in range(6)]
    run(requests, [client])
    found = by_request(run([request(i, 1e-3 * (i > 0), 5, 1, chain) for i in range(6)],
                           [RagClient("rag", index=INDEX, batch=4)]))  # fmt: skip
    first, four, last = INDEX.seconds(1), INDEX.seconds(4), INDEX.seconds(1)
    ends = [first, *[first + four] * 4, first + four + last]
    np.testing.assert_allclose(found["end"], ends, rtol=1e-12)
    assert client.steps_run == 3
    assert all(one.prompt == 15 for one in requests)


def test_one_vector_moves_from_the_embedder_to_the_index() -> None:
    """Not one per token; and the documents' text moves on to the language model."""
    clients = [RagClient("cpu", embed=EMBED), RagClient("index", index=INDEX), llm()]
    chain = (Stage("embed"), Stage("retrieve", docs=2, tokens_per_doc=50), Stage("prefill"))
    coordinator = run([request(0, 0.0, 100, 1, chain)], clients, network=Network(Level(1e9)))
    assert list(coordinator.transfers.table()["bytes"]) == [4 * 768, 4 * (100 + 2 * 50)]


def test_passes_draw_what_their_price_says() -> None:
    """And the search the client's power."""
    embed = AffineCost(base=1.0, watts=700.0)
    client = RagClient("rag", embed=embed, index=INDEX, watts=300.0)
    run([request(0, 0.0, 100, 1, (Stage("rag"),))], [client])
    assert client.step_joules == pytest.approx(700.0 * 1.0 + 300.0 * INDEX.seconds())


def test_a_client_runs_only_the_parts_it_has() -> None:
    client = RagClient("rag", index=INDEX)
    accepted = {kind: client.accepts(Stage(kind), "") for kind in ("rag", "embed", "retrieve")}
    assert accepted == {"rag": False, "embed": False, "retrieve": True}


def test_a_system_with_retrieval() -> None:
    index: dict[str, Any] = {
        "dimension": 768, "centroids": 1000, "probes": 10, "vectors_per_list": 100,
        "subquantizers": 64, "flops": 4e12, "bandwidth": 400e9,
    }  # fmt: skip
    result = System.parse({
        "clients": [{"kind": "rag", "name": "search", "embed": {"base": 0.002}, "index": index,
                     "watts": 300.0, "idle_watts": 100.0},
                    {"name": "gpu", "cost": {"prefill_token": 1e-5, "sequence": 1e-3}}],
        "workloads": [{"requests": 50, "arrivals": {"rate": 5}, "prompt": 20, "output": 4,
                       "chain": [{"kind": "rag", "docs": 3, "tokens_per_doc": 100}, "prefill",
                                 "decode"]}],
    }).simulate()  # fmt: skip
    assert result.summary["total"]["completed"] == 50
    steps = result.tables["steps"]
    prompts = steps["prefill_tokens"][steps["client"] == 1]
    assert prompts.sum() == 50 * (20 + 300)
    search = result.clients[0]
    assert search["step_joules"] == pytest.approx(300.0 * search["busy_seconds"])
    idle = result.seconds - search["busy_seconds"]
    assert search["idle_joules"] == pytest.approx(100.0 * idle)
