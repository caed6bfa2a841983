"""The simulator against the engine: a table is measured, a load predicted, and then served.

A step-cost table is measured on the engine of this device. From it the simulator predicts 200
requests at 0.3 and at 1.3 times the load that it finds the engine can bear, before they are served
in real time with the same arrivals and lengths. Then, for several lists of passes, the speed-up of
the same requests, all at once, that the tables predict is held against the measured one.

    python benchmarks/hermes_engine.py [--out FOLDER]                  # SmolLM2-135M on this CPU
    python benchmarks/hermes_engine.py --device cuda [--layers 32]     # the shape of Llama-2-7B
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from _engine_load import Arrival, Latency, at_rate, draw, serve, simulate  # noqa: E402

import fxgraft  # noqa: E402
from fxgraft import results  # noqa: E402
from fxgraft.cost_table import StepCostTable  # noqa: E402
from fxgraft.runtime.engine import Engine, EngineOptions  # noqa: E402
from fxgraft.runtime.engine.measure import measure_table  # noqa: E402

LOW, HIGH = 0.3, 1.3
MEAN_TARGET, P99_TARGET, SPEED_TARGET = 5.0, 8.0, 5.0


@dataclass(frozen=True)
class Setting:
    """A device's model, load and passes.

    Attributes:
        model: what is compiled.
        name: of it.
        backend: that lowers it.
        passes: by name, the first of which serves the load.
        options: of the engine.
        prompt, output: ranges of lengths; the upper ends are excluded.
        repeats: steps that are timed together, see ``measure_table``.
    """

    model: Any
    name: str
    backend: str
    passes: dict[str, list[Any]]
    options: EngineOptions
    prompt: tuple[int, int]
    output: tuple[int, int]
    repeats: int = 8


def main() -> None:
    """Measure, predict, serve and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=32, help="of the model on a GPU")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(2)
    setting = on_cpu() if options.device == "cpu" else on_gpu(options.layers)
    with tempfile.TemporaryDirectory() as folder:
        rows, notes = measure(setting, options.requests, Path(folder))
    name = "hermes_engine" if options.device == "cpu" else "hermes_engine_gpu"
    results.write(name, "hermes", rows, options.out, notes=notes)


def on_cpu() -> Setting:
    """SmolLM2-135M in float32."""
    from fxgraft.sources import SMOLLM2

    return Setting(
        SMOLLM2, "SmolLM2-135M", "torch",
        {"optimize": ["optimize"], "none": [],
         "prune_heads 0.3, optimize": [{"prune_heads": {"sparsity": 0.3}}, "optimize"],
         "prune_heads 0.6, optimize": [{"prune_heads": {"sparsity": 0.6}}, "optimize"]},
        EngineOptions(max_batch=8, max_context=512, chunk_tokens=128, prefix_reuse=False,
                      memory_bytes=2**28),
        (16, 160), (8, 48), repeats=2,
    )  # fmt: skip


def on_gpu(layers: int) -> Setting:
    """The shape of Llama-2-7B in bfloat16 with random weights."""
    from engine_gpu import llama

    return Setting(
        llama(layers), f"Llama-2-7B shape, {layers} layers", "triton",
        {"optimize": ["optimize"], "none": [],
         "prune_heads 0.25, optimize": [{"prune_heads": {"sparsity": 0.25}}, "optimize"],
         "prune_heads 0.5, optimize": [{"prune_heads": {"sparsity": 0.5}}, "optimize"]},
        EngineOptions(max_batch=64, max_context=4096, chunk_tokens=512, prefix_reuse=False),
        (64, 2048), (16, 384),
    )  # fmt: skip


def measure(setting: Setting, count: int, folder: Path) -> tuple[list[results.Row], list[str]]:
    """Rows and notes of one setting."""
    arrivals = draw(count, setting.prompt, setting.output, seed=0)
    rows: list[results.Row] = []
    notes: list[str] = []
    found: dict[str, tuple[Latency, Latency]] = {}
    rate = 0.0
    for name, passes in setting.passes.items():
        engine, table = prepared(setting, passes, folder / "table.json", name)
        vocabulary = engine.facts.vocab_size
        if not rate:
            rate = bearable(arrivals, folder / "table.json", engine, folder)
            say(f"the engine is predicted to bear {rate:.2f} requests/s")
            for share, label in ((LOW, "low load"), (HIGH, "overload")):
                load = at_rate(arrivals, share * rate)
                predicted = simulate(load, folder / "table.json", engine, folder)
                measured = serve(load, engine, vocabulary, say=say)
                rows += compared(predicted, measured, f"{setting.name}, {label}")
            notes.append(described(setting, table, rate, count))
        at_once = [one._replace(second=0.0) for one in arrivals]
        predicted = simulate(at_once, folder / "table.json", engine, folder)
        found[name] = predicted, serve(at_once, engine, vocabulary, say=say)
        engine.close()
    return rows + speed_ups(found), notes


def prepared(
    setting: Setting, passes: Sequence[Any], path: Path, name: str
) -> tuple[Engine, StepCostTable]:
    """An engine over a compiled model, warm, and its table in a file."""
    begun = time.perf_counter()
    compiled = fxgraft.compile(setting.model, list(passes), backend=setting.backend, check=False)
    engine = Engine(compiled, setting.options)
    table = measure_table(compiled, engine=engine, repeats=setting.repeats)
    table.save(path)
    held_out = table.origin.held_out
    error = "" if held_out is None else f", held-out error {100 * held_out.mean:.1f} %"
    say(f"{name}: {table.origin.points} points in {time.perf_counter() - begun:.0f} s{error}")
    warm = [Arrival(0.0, setting.prompt[0], 4)] * setting.options.max_batch
    serve(warm, engine, engine.facts.vocab_size)
    return engine, table


def bearable(arrivals: Sequence[Arrival], table: Path, engine: Engine, folder: Path) -> float:
    """Requests per second that the engine is predicted to serve if all come at once."""
    at_once = [one._replace(second=0.0) for one in arrivals]
    return len(arrivals) / float(simulate(at_once, table, engine, folder).e2e.max())


def compared(predicted: Latency, measured: Latency, label: str) -> list[results.Row]:
    """Errors of the predicted means and percentiles, in per cent."""
    truth = measured.figures()
    rows: list[results.Row] = []
    for name, value in predicted.figures().items():
        error = 100 * (value / truth[name] - 1)
        target = MEAN_TARGET if name.startswith("mean") else P99_TARGET
        rows.append(results.row(
            f"{label}: error of predicted {name} (measured {1e3 * truth[name]:.4g} ms)",
            abs(error), "%", target=target,
        ))  # fmt: skip
        say(f"{label}, {name}: predicted {1e3 * value:.4g}, measured {1e3 * truth[name]:.4g} ms "
            f"({error:+.1f} %)")  # fmt: skip
    return rows


def speed_ups(found: dict[str, tuple[Latency, Latency]]) -> list[results.Row]:
    """Points by which the predicted gain of each list of passes differs from the measured one."""
    first, *others = found
    rows: list[results.Row] = []
    for name in others:
        gains = [
            100 * (float(before.e2e.mean()) / float(after.e2e.mean()) - 1)
            for before, after in zip(found[first], found[name], strict=True)
        ]
        metric = f"passes [{name}] instead of [{first}]: predicted gain less measured"
        metric += f" ({gains[1]:+.1f} %)"
        rows.append(results.row(metric, abs(gains[0] - gains[1]), "points", target=SPEED_TARGET))
        say(f"{metric}: predicted {gains[0]:+.1f} %")
    return rows


def described(setting: Setting, table: StepCostTable, rate: float, count: int) -> str:
    """The conditions, in a sentence."""
    held_out = table.origin.held_out
    error = "not checked" if held_out is None else (
        f"{100 * held_out.mean:.1f} % on {held_out.steps} held-out steps")  # fmt: skip
    return (
        f"{count} requests, prompts {setting.prompt[0]} to {setting.prompt[1] - 1}, outputs "
        f"{setting.output[0]} to {setting.output[1] - 1} tokens, at {LOW} and {HIGH} times "
        f"{rate:.2f}/s. The table of {table.origin.points} points has an error of {error}. Every "
        "prediction was made before the run, from the table alone. Gains are of the mean time "
        "end to end where all requests come at once."
    )


def say(text: str) -> None:
    """Progress."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
