"""Figures of a run by hand: latencies, percentiles, goodput, censored requests, energy, money."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxgraft.runtime.hermes import Slo, System
from fxgraft.runtime.hermes.percentiles import nearest_rank, weighted_nearest_ranks
from fxgraft.runtime.hermes.results.gaps import GapHistogram, gap_values
from fxgraft.runtime.hermes.results.result import Result
from tests.runtime.hermes._systems import draw_requests, llm, run
from tests.runtime.hermes._tables import table

BASE = {"name": "gpu", "cost": {"base": 0.1}, "max_sequences": 1, "batching": "continuous"}


def simulate(client: dict[str, Any] | None = None, workload: dict[str, Any] | None = None,
             **system: Any) -> Result:  # fmt: skip
    """Ten requests, one per second, of four tokens at 0.1 s each."""
    return System.parse({
        "clients": [{**BASE, **(client or {})}],
        "workloads": [{"requests": 10, "arrivals": {"kind": "regular", "rate": 1.0}, "prompt": 20,
                       "output": 4, **(workload or {})}],
        **system,
    }).simulate()  # fmt: skip


def test_latencies_of_a_quiet_system() -> None:
    total = simulate().summary["total"]
    figures = {"ttft": 0.1, "tpot": 0.1, "itl": 0.1, "e2e": 0.4, "queue": 0.0}
    for name, seconds in figures.items():
        for figure in ("mean", "p50", "p90", "p95", "p99"):
            assert total[name][figure] == pytest.approx(seconds, abs=1e-12)
    assert total["ttft"]["count"] == total["e2e"]["count"] == 10
    assert total["itl"]["count"] == 30
    length = 9.4  # from the first arrival to the last end
    assert total["requests_per_second"] == pytest.approx(10 / length)
    assert total["output_tokens_per_second"] == pytest.approx(40 / length)
    assert total["input_tokens_per_second"] == pytest.approx(200 / length)


def test_a_stall_between_steps_is_seen_in_tpot_and_gaps() -> None:
    """A prompt that stops the decodes for a second makes gaps and time per token longer."""
    result = System.parse({
        "clients": [{"name": "gpu", "batching": "continuous",
                     "cost": {"sequence": 0.1, "prefill_token": 1e-3}}],
        "workloads": [
            {"name": "a", "requests": 1, "arrivals": {"kind": "regular", "rate": 1e6},
             "prompt": 1, "output": 11},
            {"name": "b", "requests": 1, "arrivals": {"kind": "regular", "rate": 2.2},
             "prompt": 1000, "output": 1},
        ],
    }).simulate()  # fmt: skip
    first = result.summary["workloads"]["a"]
    assert first["tpot"]["p50"] == pytest.approx((10 * 0.1 + 1.0) / 10, rel=1e-5)
    assert result.requests["max_gap"][result.requests["workload"] == 0][0] == pytest.approx(1.1)


def test_requests_of_one_token_have_no_tpot() -> None:
    total = simulate(workload={"output": 1}).summary["total"]
    assert total["tpot"]["count"] == 0
    assert math.isnan(total["tpot"]["mean"])
    assert total["e2e"]["p50"] == pytest.approx(0.1)


# -- percentiles


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 100))
def test_nearest_rank_is_the_smallest_value_with_enough_below(
    values: list[float], percent: int
) -> None:
    found = nearest_rank(np.array(values), percent)
    assert found in values
    assert sum(v <= found for v in values) * 100 >= percent * len(values)
    assert sum(v < found for v in values) * 100 < percent * len(values)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1), st.integers(1, 100))
def test_weights_stand_for_equal_values(pairs: list[tuple[int, int]], percent: int) -> None:
    values, weights = (np.array(column, float) for column in zip(*pairs, strict=True))
    whole = np.repeat(values, weights.astype(int))
    assert weighted_nearest_ranks(values, weights, [percent])[0] == nearest_rank(whole, percent)


def test_nothing_has_no_percentile() -> None:
    assert math.isnan(nearest_rank(np.array([]), 50))
    assert math.isnan(weighted_nearest_ranks(np.array([]), np.array([]), [50])[0])


# -- requests that were cut off


def test_a_horizon_hides_nobody() -> None:
    """An overloaded client: the slow ones are censored, and infinite in the percentiles."""
    result = simulate({"cost": {"base": 0.5}}, horizon=10.5)
    total = result.summary["total"]
    assert total["accepted"] == 10 == total["completed"] + total["censored"]
    assert total["completed"] == 4
    assert total["e2e"]["count"] == 10
    assert total["e2e"]["p90"] == math.inf
    assert total["e2e"]["p50"] == math.inf
    assert total["ttft"]["p50"] < math.inf
    assert "6 censored" in str(result)
    # The one that was cut off while it decoded counts with the tokens it got.
    cut = result.requests["emitted"][result.requests["state"] == 3]
    assert sorted(cut)[-1] in (1, 2, 3)
    assert total["output_tokens"] == 4 * 4 + cut.sum()


def test_rejected_requests_are_counted_with_their_reason() -> None:
    result = simulate({"context_length": 30}, {"prompt": [20, 27, 28]})
    total = result.summary["total"]
    assert total["rejected"] > 0
    assert total["completed"] == 10 - total["rejected"]
    reasons = result.summary["rejections"]
    assert sum(entry["count"] for entry in reasons) == total["rejected"]
    assert len(reasons) == 1  # the same but for the numbers
    assert "context length of 30" in reasons[0]["reason"]
    assert total["e2e"]["count"] == total["completed"]


# -- service level objectives


@pytest.mark.parametrize(
    ("slo", "good"),
    [({"ttft": 0.51}, 3), ({"e2e": 0.61}, 3), ({"tpot": 0.11}, 10), ({"tpot": 0.09}, 0),
     ({"itl": 0.11}, 10), ({"itl": 0.09}, 0), ({"ttft": 0.51, "tpot": 0.09}, 0),
     ({"ttft": 0.51, "e2e": 0.41}, 2), ({"ttft": 100.0}, 10)],
    ids=str,
)  # fmt: skip
def test_goodput_counts_who_meets_every_limit(slo: dict[str, float], good: int) -> None:
    """All at once, one after another: first tokens after 0.1, 0.3, ..., ends after 0.2, 0.4, ..."""
    workload = {"arrivals": {"kind": "regular", "rate": 1e9}, "output": 2}
    figures = simulate(None, workload, slo=slo).summary["total"]["slo"]
    assert figures["good"] == good
    assert figures["share"] == good / 10
    assert figures["goodput"] == pytest.approx(good / 2.0, rel=1e-6)


def test_published_conditions_on_percentiles() -> None:
    """p50, p90, p99 of time to first token at 2, 3, 6 times the base, of tokens at 1.25, 1.5, 5."""
    slo = Slo(ttft=0.25, tpot=0.025)
    rows = slo.percentiles(np.array([0.4] * 9 + [9.0]), np.array([0.03, np.nan, 0.03]))
    limits = [limit for *_, limit in rows]
    np.testing.assert_allclose(limits, [0.5, 0.75, 1.5, 0.03125, 0.0375, 0.125])
    assert [value <= limit for *_, value, limit in rows] == [True, True, False, True, True, True]
    total = simulate(slo={"ttft": 0.05, "tpot": 0.05}).summary["total"]["slo"]
    assert not total["percentiles_met"]
    met = [row["met"] for row in total["percentiles"] if row["of"] == "ttft"]
    assert met == [True, True, True]  # 0.1 is twice the base


def test_an_unfinished_request_is_not_good() -> None:
    result = simulate({"cost": {"base": 0.5}}, horizon=10.5, slo={"ttft": 1e6})
    assert result.summary["total"]["slo"]["good"] == result.summary["total"]["completed"] == 4


def test_workloads_have_objectives_of_their_own() -> None:
    result = System.parse({
        "clients": [{**BASE, "max_sequences": 8}],
        "slo": {"ttft": 1.0},
        "workloads": [{"name": n, "requests": 5, "arrivals": {"kind": "regular", "rate": 1.0},
                       "prompt": 5, "output": 2, **more}
                      for n, more in (("a", {}), ("b", {"slo": {"ttft": 1e-3}}))],
    }).simulate()  # fmt: skip
    found = result.summary["workloads"]
    assert (found["a"]["slo"]["good"], found["b"]["slo"]["good"]) == (5, 0)
    assert "slo" not in result.summary["total"]  # no one limit for all


# -- energy and money


def test_energy_is_that_of_steps_and_of_the_time_between() -> None:
    result = simulate({"watts": 400.0, "idle_watts": 50.0, "dollars_per_hour": 3.6})
    client, total = result.clients[0], result.summary["total"]
    assert client["busy_seconds"] == pytest.approx(4.0)
    assert client["step_joules"] == pytest.approx(400 * 4.0)
    assert client["idle_joules"] == pytest.approx(50 * (result.seconds - 4.0))
    assert total["joules"] == client["joules"] == client["step_joules"] + client["idle_joules"]
    assert total["joules_per_token"] == pytest.approx(total["joules"] / 40)
    assert total["tokens_per_joule"] == pytest.approx(40 / total["joules"])
    assert total["tokens_per_dollar"] == pytest.approx(40 / (1e-3 * result.seconds))
    steps = result.tables["steps"]
    assert steps["joules"].sum() == pytest.approx(client["step_joules"], rel=1e-12)


@pytest.mark.parametrize("stepwise", [False, True])
def test_joules_of_a_table_go_before_watts(stepwise: bool) -> None:
    def joules(watts: float | None, **options: Any) -> float:
        cost = table(watts=watts).pricer()
        requests = draw_requests(np.random.default_rng(2), 30)
        client = llm(cost=cost, stepwise=stepwise, **options)
        run(requests, [client])
        assert client.step_joules == pytest.approx((watts or 0) * client.busy_seconds, rel=1e-9)
        return client.step_joules

    assert joules(300.0) > 0
    assert joules(None) == 0


def test_watts_of_a_client_whose_table_has_no_joules(tmp_path: Any) -> None:
    def run_with(watts: float | None) -> dict[str, Any]:
        file = table(watts=watts).save(tmp_path / "table.json")
        return simulate({"cost": str(file), "watts": 100.0}, {"model": "m"}).clients[0]

    bare, known = run_with(None), run_with(300.0)
    assert bare["step_joules"] == pytest.approx(100.0 * bare["busy_seconds"])
    assert known["step_joules"] == pytest.approx(300.0 * known["busy_seconds"])
    assert known["idle_joules"] == pytest.approx(20.0 * (10.05 - known["busy_seconds"]), rel=0.01)


def test_a_step_that_the_horizon_cuts_is_charged_in_part() -> None:
    result = simulate({"cost": {"base": 4.0}, "watts": 10.0}, horizon=3.0)
    client = result.clients[0]
    assert client["busy_seconds"] == pytest.approx(2.0)  # from the first arrival at 1 s
    assert client["step_joules"] == pytest.approx(20.0)
    assert client["utilisation"] == pytest.approx(2 / 3)


# -- gaps


def test_gaps_in_bins_agree_with_exact_ones() -> None:
    """What runs of millions of tokens report, on a run where both can be had."""
    coordinator = run(draw_requests(np.random.default_rng(0), 200, rate=12.0), [llm()])
    steps, gaps = coordinator.steps.table(), coordinator.gaps.table()
    values, weights = gap_values(steps, gaps)
    found = GapHistogram.of(steps, gaps).describe()
    assert found["count"] == weights.sum() > 1000
    assert found["mean"] == pytest.approx(values @ weights / weights.sum(), rel=1e-9)
    for percent in (50, 90, 99):
        exact = weighted_nearest_ranks(values, weights, [percent])[0]
        assert found[f"p{percent}"] == pytest.approx(exact, rel=1e-3)


def test_runs_with_very_many_tokens_report_their_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = simulate().summary["total"]["itl"]
    monkeypatch.setattr("fxgraft.runtime.hermes.results.result._EXACT_ROWS", 1)
    binned = simulate().summary["total"]["itl"]
    assert binned["count"] == exact["count"] == 30
    assert binned["p99"] == pytest.approx(exact["p99"], rel=1e-3)
