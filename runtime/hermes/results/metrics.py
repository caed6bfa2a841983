"""Latencies, throughput, goodput, energy: figures of a run from its logs (spec section 11)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxgraft.runtime.hermes.log import Array
from fxgraft.runtime.hermes.percentiles import describe
from fxgraft.runtime.hermes.request import COMPLETED, REJECTED, TERMINAL
from fxgraft.runtime.hermes.slo import Slo

Table = Mapping[str, Array]


@dataclass(frozen=True)
class Latencies:
    """Per request that was not rejected, in seconds, float64 [N].

    What a request never got, because it timed out or the run stopped before, is infinite: it counts
    in every percentile instead of vanishing from the statistics.

    Attributes:
        ttft: from arrival to the first token; requests that want no tokens have none and are left
            out.
        tpot: (last token - first token) / (tokens - 1); NaN for requests of one token. Requests
            that were cut off while they decoded count with the tokens they got.
        e2e: from arrival to end.
        itl: longest gap between two tokens.
        queue: waiting in all stages.
        transfer: moving between clients.
    """

    ttft: Array
    tpot: Array
    e2e: Array
    itl: Array
    queue: Array
    transfer: Array


def latencies(requests: Table) -> Latencies:
    """Latencies of the requests of a log that were not rejected."""
    kept = requests["state"] != TERMINAL.index(REJECTED)
    rows = {name: column[kept] for name, column in requests.items()}
    began = rows["first_token"] >= 0
    done = rows["state"] == TERMINAL.index(COMPLETED)
    gaps = rows["decode_gaps"]
    ttft = np.where(began, rows["first_token"] - rows["arrival"], np.inf)
    return Latencies(
        ttft=ttft[began | ~done],
        tpot=np.where(gaps > 0, rows["decode_seconds"] / np.maximum(gaps, 1), np.nan),
        e2e=np.where(done, rows["end"] - rows["arrival"], np.inf),
        itl=rows["max_gap"],
        queue=rows["queue_seconds"],
        transfer=rows["transfer_seconds"],
    )


def good(requests: Table, slo: Slo) -> Array:
    """Which requests completed and met every limit, bool [N]."""
    gaps = requests["decode_gaps"]
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where(gaps > 0, requests["decode_seconds"] / gaps, np.nan)
    first = requests["first_token"]
    met = slo.met(
        ttft=np.where(first >= 0, first - requests["arrival"], 0.0),
        tpot=tpot,
        e2e=requests["end"] - requests["arrival"],
        itl=requests["max_gap"],
    )
    return met & (requests["state"] == TERMINAL.index(COMPLETED))


def of_requests(requests: Table, seconds: float, slo: Slo | None) -> dict[str, Any]:
    """Figures of some requests.

    Args:
        requests: rows of ``REQUEST_COLUMNS``.
        seconds: length of the run.
        slo: what a good request meets.
    """
    found = latencies(requests)
    times = {
        "ttft": found.ttft, "tpot": found.tpot[~np.isnan(found.tpot)], "e2e": found.e2e,
        "queue": found.queue, "transfer": found.transfer,
    }  # fmt: skip
    states = {
        name: int((requests["state"] == number).sum()) for number, name in enumerate(TERMINAL)
    }
    length = seconds or float("nan")
    figures: dict[str, Any] = {
        "accepted": len(requests["state"]),
        **states,
        **{name: describe(values) for name, values in times.items()},
        "requests_per_second": states[COMPLETED] / length,
        "input_tokens_per_second": float(requests["prompt"].sum()) / length,
        "output_tokens_per_second": float(requests["emitted"].sum()) / length,
        "output_tokens": int(requests["emitted"].sum()),
        "preemptions": int(requests["preemptions"].sum()),
        "recomputed_tokens": int(requests["recomputed"].sum()),
        "reused_tokens": int(requests["reused"].sum()),
    }
    if slo is not None:
        count = int(good(requests, slo).sum())
        conditions = slo.percentiles(found.ttft, found.tpot)
        figures["slo"] = {
            "good": count,
            "goodput": count / length,
            "share": count / max(len(requests["state"]), 1),
            "percentiles": [
                {"of": name, "percent": percent, "seconds": value, "limit": limit,
                 "met": value <= limit}
                for name, percent, value, limit in conditions
            ],
            "percentiles_met": all(value <= limit for *_, value, limit in conditions),
        }  # fmt: skip
    return figures


def number_in_system(start: Array, end: Array, seconds: float) -> float:
    """Mean number of requests that are somewhere: their number, integrated over time.

    Args:
        start, end: when each came and left, in seconds [N].
        seconds: length of the run.
    """
    times = np.concatenate([start, end])
    changes = np.concatenate([np.ones(len(start)), -np.ones(len(end))])
    order = np.lexsort((-changes, times))
    number = np.cumsum(changes[order])
    return float((number[:-1] * np.diff(times[order])).sum()) / seconds
