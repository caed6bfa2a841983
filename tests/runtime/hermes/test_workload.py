"""Arrivals, lengths, traces and closed loops: what they draw, from streams of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fxgraft.errors import InputError
from fxgraft.runtime.hermes import System
from fxgraft.runtime.hermes.results.result import Result
from fxgraft.runtime.hermes.workload.traces import read_trace

GPU = {"name": "gpu", "cost": {"base": 1e-3}, "max_batched_tokens": 1 << 16}
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:05.4799600,110,27
"""


def simulate(workload: dict[str, Any], **system: Any) -> Result:
    workload = {"requests": 20_000, "arrivals": {"rate": 5.0}, "prompt": 10, "output": 1,
                "chain": ["prefill"], **workload}  # fmt: skip
    return System.parse({"clients": [GPU], "workloads": [workload], **system}).simulate()


def arrivals(result: Result) -> Any:
    return np.sort(result.requests["arrival"])


def lengths(law: Any, count: int = 20_000) -> Any:
    return simulate({"prompt": law, "requests": count}).requests["prompt"]


# -- arrivals


@pytest.mark.parametrize(
    ("law", "variation"),
    [({"kind": "regular"}, 0.0), ({"kind": "poisson"}, 1.0), ({}, 1.0),
     ({"kind": "gamma", "variation": 2.5}, 2.5), ({"kind": "gamma", "variation": 0.5}, 0.5),
     ({"kind": "normal"}, 0.25)],
    ids=str,
)  # fmt: skip
def test_rate_and_variation_of_gaps(law: dict[str, Any], variation: float) -> None:
    gaps = np.diff(arrivals(simulate({"arrivals": {**law, "rate": 5.0}})))
    assert gaps.mean() == pytest.approx(0.2, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, abs=0.06 * variation + 1e-9)
    assert gaps.min() >= 0


def test_bursty_arrivals_swing_with_the_period() -> None:
    """Mean rate · (1 + 2 · 3/8); the middle of a period has about three times that of its ends."""
    times = arrivals(simulate({"arrivals": {"kind": "bursty", "rate": 5.0, "period": 40.0}}))
    phase = (times % 40.0) / 40.0
    assert len(times) / times[-1] == pytest.approx(5.0 * 1.75, rel=0.03)
    counts, _ = np.histogram(phase, 20, (0, 1))
    assert counts[9:11].sum() / (counts[0] + counts[-1]) == pytest.approx(3.0, rel=0.1)


# -- lengths


def test_laws_of_lengths() -> None:
    assert set(lengths(7, 50)) == {7}
    assert set(lengths([3, 9, 27], 500)) == {3, 9, 27}
    uniform = lengths({"kind": "uniform", "low": 2, "high": 5})
    assert set(uniform) == {2, 3, 4, 5}
    assert uniform.mean() == pytest.approx(3.5, rel=0.02)
    log = lengths({"kind": "lognormal", "median": 200.0, "deviation": 0.7})
    assert np.median(log) == pytest.approx(200, rel=0.03)
    assert np.log(log).std() == pytest.approx(0.7, rel=0.03)
    zipf = lengths({"kind": "zipf", "exponent": 1.0, "maximum": 3})
    shares = np.bincount(zipf.astype(int))[1:] / len(zipf)
    np.testing.assert_allclose(shares, np.array([6, 3, 2]) / 11, atol=0.015)


def test_normal_lengths_are_cut_off_below_one() -> None:
    """Drawn again, not folded over: no heap of ones, and the mean of the truncated law."""
    values = lengths({"kind": "normal", "mean": 10.0, "deviation": 10.0})
    assert values.min() == 1
    # Standard normal above a = (0.5 - 10) / 10: mean of pdf(a) / (1 - cdf(a)).
    assert values.mean() == pytest.approx(10 + 10 * 0.2541 / 0.8289, rel=0.02)


def test_bounds_hold() -> None:
    values = lengths({"kind": "normal", "mean": 100.0, "deviation": 80.0, "minimum": 50,
                      "maximum": 120})  # fmt: skip
    assert (values.min(), values.max()) == (50, 120)


def test_shared_keys_follow_their_law() -> None:
    def contexts(keys: dict[str, Any]) -> list[int]:
        store = {"kind": "storage", "name": "s", "kv_bytes": 1.0, "levels": [{"bandwidth": 1e9}]}
        result = System.parse({
            "clients": [store],
            "workloads": [{"requests": 3000, "arrivals": {"kind": "regular", "rate": 1.0},
                           "prompt": 1, "output": 1, "context": 10, "keys": keys,
                           "chain": ["kv_retrieval"]}],
        }).simulate()  # fmt: skip
        return result.clients[0]["hits_by_level"]

    assert contexts({"law": "private"}) == [0, 3000]
    assert contexts({"law": "uniform", "count": 40}) == [2960, 40]
    hits, misses = contexts({"law": "zipf", "count": 100_000})
    assert 500 < hits == 3000 - misses < 2500


# -- streams


def test_the_same_seed_gives_the_same_requests_and_another_one_others() -> None:
    law = {"prompt": {"kind": "uniform", "low": 1, "high": 1000}, "requests": 200}
    first, same, other = (simulate(law, seed=seed).requests for seed in (3, 3, 4))
    for column in ("arrival", "prompt", "end"):
        np.testing.assert_array_equal(first[column], same[column])
        assert (first[column] != other[column]).any()


def test_more_clients_or_workloads_do_not_change_the_others_arrivals() -> None:
    one = {"name": "one", "requests": 300, "arrivals": {"rate": 5.0}, "output": 1,
           "prompt": {"kind": "uniform", "low": 1, "high": 900}, "chain": ["prefill"]}  # fmt: skip
    two = {**one, "name": "two", "arrivals": {"rate": 50.0}}
    alone = System.parse({"clients": [GPU], "workloads": [one]}).simulate().requests
    both = System.parse({
        "clients": [GPU, {**GPU, "name": "more"}], "workloads": [one, two],
        "logs": ["requests"],
    }).simulate().requests  # fmt: skip
    mine = both["workload"] == 0
    for column in ("arrival", "prompt"):
        np.testing.assert_array_equal(np.sort(both[column][mine]), np.sort(alone[column]))


# -- traces


def trace(folder: Path, text: str) -> Path:
    file = folder / "trace.csv"
    file.write_text(text)
    return file


def test_the_azure_format(tmp_path: Path) -> None:
    file = trace(tmp_path, AZURE)
    result = simulate({"arrivals": str(file), "prompt": None, "output": None, "requests": None,
                       "chain": ["prefill", "decode"]})  # fmt: skip
    requests = result.requests
    order = np.argsort(requests["request"])
    np.testing.assert_allclose(requests["arrival"][order], [0, 0.052, 1.5], atol=1e-9)
    assert list(requests["prompt"][order]) == [4808, 3180, 110]
    assert list(requests["output"][order]) == [10, 8, 27]
    assert list(requests["emitted"][order]) == [10, 8, 27]


def test_time_zones_and_marks_of_utf_8(tmp_path: Path) -> None:
    text = "\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\n"
    text += "2024-05-10 00:00:00.009930+00:00,5,6\n2024-05-10T00:00:01.009930Z,7,8\n"
    rows = read_trace(trace(tmp_path, text))
    np.testing.assert_allclose(rows.arrival, [0.0, 1.0], atol=1e-9)


def test_a_trace_with_context_and_keys(tmp_path: Path) -> None:
    file = trace(tmp_path, "arrival,prompt,output,context,key\n0.5,1,2,3,4\n\n0.75,5,6,7,8\n")
    rows = read_trace(file)
    assert rows.has_context
    assert [
        list(column) for column in (rows.arrival, rows.prompt, rows.output, rows.context, rows.key)
    ] == [[0.5, 0.75], [1, 5], [2, 6], [3, 7], [4, 8]]


def test_stretch_changes_the_load(tmp_path: Path) -> None:
    file = str(trace(tmp_path, "arrival,prompt,output\n0,5,1\n2,5,1\n8,5,1\n"))
    fields = {"prompt": None, "output": None, "requests": None}
    result = simulate({**fields, "arrivals": {"kind": "trace", "file": file, "stretch": 0.5}})
    np.testing.assert_allclose(arrivals(result), [0, 1, 4])


def test_rows_out_of_order(tmp_path: Path) -> None:
    file = trace(tmp_path, "arrival,prompt,output\n1,5,1\n\n3,6,1\n2,7,1\n")
    with pytest.raises(InputError, match=r"trace\.csv, row 5: its arrival is before"):
        read_trace(file)
    fields = {"prompt": None, "output": None, "requests": None}
    result = simulate({**fields, "arrivals": {"kind": "trace", "file": str(file), "sort": True}})
    np.testing.assert_allclose(arrivals(result), [1, 2, 3])
    assert "2 rows of its trace were out of order" in str(result)


def test_lengths_of_a_trace_with_other_arrivals(tmp_path: Path) -> None:
    rows = "\n".join(f"{i + 1},{2 * i + 1}" for i in range(50))
    file = str(trace(tmp_path, f"prompt,output\n{rows}\n"))
    fields = {"prompt": None, "output": None, "requests": 120, "chain": ["prefill", "decode"]}
    in_order = simulate({**fields, "lengths": file}).requests
    order = np.argsort(in_order["request"])
    expected = np.arange(120) % 50 + 1
    np.testing.assert_array_equal(in_order["prompt"][order], expected)
    drawn = simulate({**fields, "lengths": {"file": file, "order": "draw"}}).requests
    np.testing.assert_array_equal(drawn["output"], 2 * drawn["prompt"] - 1)
    assert (drawn["prompt"] != in_order["prompt"]).any()


def test_arrivals_of_one_trace_and_lengths_of_another(tmp_path: Path) -> None:
    lengths_file = tmp_path / "lengths.csv"
    lengths_file.write_text("prompt,output\n11,2\n12,3\n")
    file = str(trace(tmp_path, "arrival,prompt,output\n0,5,1\n2,6,1\n"))
    requests = simulate({"prompt": None, "output": None, "requests": None, "arrivals": file,
                         "lengths": str(lengths_file)}).requests  # fmt: skip
    assert sorted(requests["prompt"]) == [11, 12]


# -- closed loop


def test_users_ask_again_when_they_have_their_answer() -> None:
    """Alone on the machine each takes 0.5 s, then thinks for 2 s."""
    result = System.parse({
        "clients": [{"kind": "host", "name": "host", "cores": 8,
                     "tasks": {"default": {"seconds": 0.5}}}],
        "workloads": [{"requests": 30, "arrivals": {"kind": "closed", "users": 3, "think": 2.0},
                       "prompt": 1, "output": 1, "chain": ["preprocess"]}],
    }).simulate()  # fmt: skip
    np.testing.assert_allclose(arrivals(result), np.repeat(np.arange(10) * 2.5, 3))


def test_a_closed_loop_obeys_the_response_time_law() -> None:
    """Throughput · (response + thinking) = users, and never more than the users in the system."""
    users, think = 20, 1.0
    result = System.parse({
        "clients": [{"kind": "host", "name": "host", "cores": 2,
                     "tasks": {"default": {"seconds": 0.2, "law": "exponential"}}}],
        "workloads": [{"requests": 20_000, "prompt": 1, "output": 1, "chain": ["preprocess"],
                       "arrivals": {"kind": "closed", "users": users, "think": think,
                                    "law": "exponential"}}],
    }).simulate()  # fmt: skip
    requests = result.requests
    response = (requests["end"] - requests["arrival"]).mean()
    rate = len(requests["end"]) / result.seconds
    assert rate * (response + think) == pytest.approx(users, rel=0.02)
    changes = np.concatenate([np.ones(20_000), -np.ones(20_000)])
    times = np.concatenate([requests["arrival"], requests["end"]])
    assert np.cumsum(changes[np.lexsort((changes, times))]).max() <= users


def test_open_and_closed_workloads_together() -> None:
    closed = {"name": "closed", "requests": 40, "arrivals": {"kind": "closed", "users": 2},
              "prompt": 4, "output": 3}  # fmt: skip
    opened = {"name": "open", "requests": 60, "arrivals": {"rate": 50}, "prompt": 4, "output": 3}
    result = System.parse({"clients": [GPU], "workloads": [closed, opened]}).simulate()
    figures = result.summary["workloads"]
    assert {name: figures[name]["completed"] for name in figures} == {"closed": 40, "open": 60}


def test_users_who_give_up() -> None:
    """Those who still wait for their first token after the timeout leave, and are counted."""
    result = System.parse({
        "clients": [{"name": "gpu", "cost": {"base": 1.0}, "max_sequences": 1}],
        "workloads": [{"requests": 10, "arrivals": {"kind": "regular", "rate": 1e3}, "prompt": 4,
                       "output": 3, "timeout": 5.5}],
    }).simulate()  # fmt: skip
    total = result.summary["total"]
    assert (total["completed"], total["timed_out"]) == (2, 8)
    assert total["ttft"]["p99"] == float("inf")
