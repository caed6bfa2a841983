"""DSLA-Serve in the simulator: what converting layers under load does to latency.

A Llama-2-7B shape on an H100 by peak rates, with the requests, the engine's options and the memory
of ``dsla_serve_gpu.py``: the paper's mix of prompt lengths, Poisson arrivals. Three ways to serve
them: softmax only, the policy, and half of the layers linear from the start. Where the measured
result of ``dsla_serve_gpu.py`` is there, it stands beside.

    python benchmarks/hermes_dsla.py [--layers 32] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import engine_gpu  # noqa: E402
from _engine_load import Arrival, at_rate  # noqa: E402
from dsla_serve_gpu import MIX, _arrivals  # noqa: E402 # pyright: ignore[reportPrivateUsage]

import fxgraft  # noqa: E402
from fxgraft import results  # noqa: E402
from fxgraft.cost_table import StepCostTable  # noqa: E402
from fxgraft.element_types import ElementTypes  # noqa: E402
from fxgraft.passes.dsla import Dsla  # noqa: E402
from fxgraft.passes.dsla.levels import at_level, state_bytes  # noqa: E402
from fxgraft.roofline import roofline_table  # noqa: E402
from fxgraft.runtime.hermes import System  # noqa: E402
from fxgraft.step_tables import Ranges  # noqa: E402

REQUESTS, SEQUENCES, CHUNK, CONTEXT, BLOCK = 160, 64, 2048, 20_480, 16
RATES = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
DEVICE, DEVICE_BYTES, GPU_SHARE = "h100-sxm", 84.9e9, 0.9
"""Bytes that an H100 of 80 GB reports, and the share of what weights leave that an engine takes."""
POLICIES: dict[str, dict[str, Any] | None] = {
    "softmax": None, "policy": {"kind": "dsla"}, "half linear": {"kind": "dsla", "floor": 0.5},
}  # fmt: skip
BATCHES = (1, 16)


class Served(NamedTuple):
    """One run.

    Attributes:
        per_token: milliseconds from arrival to end per output token, [requests].
        preemptions, conversions: in all.
        level: mean at the end, in layers.
    """

    per_token: np.ndarray[Any, np.dtype[np.float64]]
    preemptions: int
    conversions: int
    level: float


def main() -> None:
    """Make the table, serve at every rate, write result and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result")
    options = parser.parse_args()
    table, blocks = leveled_table(options.layers)
    print(f"table: {blocks} blocks of {BLOCK} tokens", flush=True)
    arrivals = _arrivals(REQUESTS, smoke=False)
    found: dict[tuple[float, str], Served] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rate in RATES:
            for name in POLICIES:
                found[rate, name] = serve(table, blocks, at_rate(arrivals, rate), name, folder)
                one = found[rate, name]
                print(f"{rate:g}/s, {name}: {one.per_token.mean():.1f} ms per token, "
                      f"{one.preemptions} preemptions, {one.conversions} conversions, mean level "
                      f"{one.level:.1f}", flush=True)  # fmt: skip
    prompts = [one.prompt for one in arrivals]
    write(table, blocks, found, prompts, options.out)


def leveled_table(layers: int) -> tuple[StepCostTable, int]:
    """Prices at every level, and the KV blocks that the engine of ``dsla_serve_gpu.py`` has."""
    passes = fxgraft.Pipeline.parse(["optimize", Dsla(fraction=1.0, live=True)])
    live = passes.run(fxgraft.capture(engine_gpu.llama(layers, device="meta")), check=False)
    ranges = Ranges(tokens=2 * CHUNK, sequences=SEQUENCES, new_tokens=CHUNK, context=CONTEXT)
    linear = at_level(live, layers)
    # The engine keeps states in float32.
    converted = roofline_table(
        linear, DEVICE, ElementTypes("bfloat16", "bfloat16", "float32"), ranges=ranges
    )
    softmax = roofline_table(at_level(live, 0), DEVICE, "bfloat16", ranges=ranges)
    slots = state_bytes(linear) * (SEQUENCES + 1)
    left = GPU_SHARE * (DEVICE_BYTES - converted.memory.weights) - slots
    table = softmax.with_levels(converted, layers=layers, offered=layers)
    return table, int(left / (BLOCK * table.memory.bytes_per_token))


def serve(
    table: StepCostTable, blocks: int, arrivals: Sequence[Arrival], name: str, folder: str
) -> Served:
    """Simulate a load on one engine."""
    trace, prices = Path(folder) / "trace.csv", Path(folder) / "table.json"
    with trace.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arrival", "prompt", "output"])
        writer.writerows(arrivals)
    table.save(prices)
    result = System.parse({
        "clients": [{
            "name": "engine", "cost": str(prices), "batching": "alternating", "blocks": blocks,
            "max_batched_tokens": CHUNK, "max_sequences": SEQUENCES, "block_size": BLOCK,
            "policy": POLICIES[name],
        }],
        "workloads": [{"name": "load", "arrivals": str(trace)}],
    }).simulate()  # fmt: skip
    rows = result.requests
    order = np.argsort(rows["request"])
    seconds = (rows["end"] - rows["arrival"]) / rows["output"]
    [client] = result.summary["clients"]
    return Served(
        1e3 * seconds[order], int(rows["preemptions"].sum()), client.get("conversions", 0),
        float(rows["level"].mean()),
    )  # fmt: skip


def break_even(table: StepCostTable, batch: int) -> int:
    """The least context at which a decode step of converted layers takes less time."""
    contexts = np.arange(1, 8192)
    ends = [table.at_level(0), table.at_level(table.levels.offered if table.levels else 0)]
    soft, linear = (one.lookup("decode", batch=batch, context=contexts).seconds for one in ends)
    return int(contexts[np.argmax(linear < soft)])


def measured(folder: Path) -> dict[float, float]:
    """Latency without the policy over that with it, by rate, as ``dsla_serve_gpu.py`` found it."""
    start, end = "latency without over with the policy at ", "/s"
    return {
        float(row.metric.removeprefix(start).removesuffix(end)): row.value
        for one in results.read_all(folder) if one.name == "dsla_serve_gpu"
        for row in one.rows if row.metric.startswith(start)
    }  # fmt: skip


def write(
    table: StepCostTable,
    blocks: int,
    found: dict[tuple[float, str], Served],
    prompts: Sequence[int],
    folder: Path,
) -> None:
    """The result file, and latency by rate as a picture."""
    real, rows = measured(HERE / "results"), list[results.Row]()
    for rate in RATES:
        plain = found[rate, "softmax"].per_token.mean()
        for name in POLICIES:
            rows.append(results.row(
                f"latency per token at {rate:g}/s, {name}", found[rate, name].per_token.mean(),
                "ms", peer=("softmax", plain) if name != "softmax" else None,
            ))  # fmt: skip
        rows.append(results.row(
            f"latency without over with the policy at {rate:g}/s",
            plain / found[rate, "policy"].per_token.mean(), "", better="higher",
            peer=("measured", real[rate]) if rate in real else None,
        ))  # fmt: skip
        for name in POLICIES:
            rows.append(results.row(f"preemptions at {rate:g}/s, {name}",
                                    found[rate, name].preemptions, ""))  # fmt: skip
    for low, high, _ in MIX:
        own = [low <= prompt < high for prompt in prompts]
        plain, policy = (found[RATES[-1], name].per_token[own] for name in ("softmax", "policy"))
        rows.append(results.row(
            f"latency without over with the policy at {RATES[-1]:g}/s, prompts of {low} to {high}",
            plain.mean() / policy.mean(), "", better="higher",
        ))  # fmt: skip
    for batch in BATCHES:
        rows.append(results.row(f"context from which linear layers decode faster, batch {batch}",
                                break_even(table, batch), "tokens"))  # fmt: skip
    note = (f"simulated: {REQUESTS} requests, {blocks} KV blocks of {BLOCK} tokens, peak rates of "
            f"{DEVICE} at 75 %, states in float32, gates that read keys")  # fmt: skip
    results.write("hermes_dsla", "hermes", rows, folder, notes=[note])
    draw(found, folder / "hermes_dsla.svg")


def draw(found: dict[tuple[float, str], Served], path: Path) -> None:
    """Mean latency per token by rate of arrival, and preemptions."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams.update({"svg.hashsalt": "fxgraft", "svg.fonttype": "none"})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for name in POLICIES:
        runs = [found[rate, name] for rate in RATES]
        left.plot(RATES, [one.per_token.mean() for one in runs], ".-", label=name)
        right.plot(RATES, [one.preemptions for one in runs], ".-", label=name)
    left.set(xlabel="requests/s", ylabel="ms per token, arrival to end", yscale="log")
    right.set(xlabel="requests/s", ylabel="preemptions")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
