"""A load on the engine in real time, and the same load in the simulator."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fxgraft.generation.options import SamplingOptions
from fxgraft.runtime.engine import Engine
from fxgraft.runtime.hermes import System

Times = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class Arrival(NamedTuple):
    """A request: when it comes, in seconds, and its tokens."""

    second: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Latency:
    """Seconds of each request, float64 [N]: to the first token, per token after it, to the end."""

    ttft: Times
    tpot: Times
    e2e: Times

    def figures(self) -> dict[str, float]:
        """Means and 99th percentiles, in seconds."""
        values = {"TTFT": self.ttft, "TPOT": self.tpot, "end to end": self.e2e}
        found = {f"mean {name}": float(np.nanmean(one)) for name, one in values.items()}
        return found | {
            f"p99 {name}": float(np.nanpercentile(one, 99)) for name, one in values.items()
        }


def draw(count: int, prompt: tuple[int, int], output: tuple[int, int], seed: int) -> list[Arrival]:
    """Requests of random lengths with Poisson arrivals at a rate of one per second."""
    random = np.random.default_rng(seed)
    return [
        Arrival(float(second), int(random.integers(*prompt)), int(random.integers(*output)))
        for second in np.cumsum(random.exponential(1.0, count))
    ]


def at_rate(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """The same requests at so many per second."""
    return [one._replace(second=one.second / rate) for one in arrivals]


def simulate(arrivals: Sequence[Arrival], table: Path, engine: Engine, folder: Path) -> Latency:
    """What the simulator says of a load, from a step-cost table of the engine."""
    trace = folder / "trace.csv"
    with trace.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arrival", "prompt", "output"])
        writer.writerows(arrivals)
    options = engine.options
    group = engine.memory.groups[0]
    system = System.parse({
        "clients": [{
            "name": "engine", "cost": {"kind": "table", "file": str(table), "outside": "mark"},
            "batching": "alternating", "max_batched_tokens": options.chunk_tokens,
            "max_sequences": options.max_batch, "blocks": group.total,
            "block_size": options.block_size,
        }],
        "workloads": [{"name": "load", "arrivals": str(trace)}],
    })  # fmt: skip
    rows = system.simulate().requests
    order = np.argsort(rows["request"])
    rows = {name: column[order] for name, column in rows.items()}
    gaps = rows["decode_gaps"]
    with np.errstate(invalid="ignore"):
        tpot = np.where(gaps > 0, rows["decode_seconds"] / gaps, np.nan)
    return Latency(rows["first_token"] - rows["arrival"], tpot, rows["end"] - rows["arrival"])


def serve(
    arrivals: Sequence[Arrival],
    engine: Engine,
    vocabulary: int,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Latency:
    """Run a load on an engine in real time; the requests' tokens are random."""
    random = np.random.default_rng(0)
    prompts = [random.integers(3, vocabulary, one.prompt).tolist() for one in arrivals]
    requests: list[Any] = []
    begun, said = time.monotonic(), 0
    while len(requests) < len(arrivals) or not all(one.is_finished for one in requests):
        now = time.monotonic() - begun
        while len(requests) < len(arrivals) and arrivals[len(requests)].second <= now:
            one = arrivals[len(requests)]
            sampling = SamplingOptions(max_new_tokens=one.output, eos_token_id=())
            requests.append(engine.submit(prompts[len(requests)], sampling))
        if not engine.step() and len(requests) < len(arrivals):
            time.sleep(max(arrivals[len(requests)].second - (time.monotonic() - begun), 0.0))
        if now - said > 20.0:
            said = now
            done = sum(one.is_finished for one in requests)
            say(f"{now:.0f} s: {done} of {len(arrivals)} requests")
    came = np.array([begun + one.second for one in arrivals])
    first = np.array([one.first_token for one in requests])
    ended = np.array([one.finished for one in requests])
    more = np.array([max(one.output - 1, 0) for one in arrivals], np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where(more > 0, (ended - first) / more, np.nan)
    return Latency(first - came, tpot, ended - came)
