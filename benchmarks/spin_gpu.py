"""What suppressing heads costs on one GPU: a Llama of 7 B, random weights in bf16, 576 image keys.

    python benchmarks/spin_gpu.py
    python benchmarks/spin_gpu.py --tiny     # a toy on the CPU: does it run? writes nothing

The engine's captured decode step, plain and with ``spin`` in three ways, rounds interleaved where
memory allows; the same step with the attention matrix written out, as the authors' code has it; and
prompts of 641 tokens.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _spin_eager import EagerStep, Suppression, captured
from _spin_runs import TINY, Shape, compiled_of, engine_of, prompt_of, step_of
from engine_gpu import replay_seconds

import fxgraft
from fxgraft import results

HERE = Path(__file__).parent
POINTS = ((1, 704), (8, 704), (32, 704), (16, 4096))
EAGER_POINTS = ((1, 704), (8, 704), (32, 704))
PROMPTS = (1, 8)
ROUNDS, CALLS = 7, 8
Times = dict[str, float]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result")
    parser.add_argument("--tiny", action="store_true", help="a toy on the CPU; writes nothing")
    arguments = parser.parse_args()
    if arguments.tiny:
        small = ((1, 24), (3, 40))
        print(measure(TINY, small, small[:1], (2,)))
        return
    write(measure(Shape(), POINTS, EAGER_POINTS, PROMPTS), arguments.out)


def measure(
    shape: Shape,
    points: tuple[tuple[int, int], ...],
    eager_points: tuple[tuple[int, int], ...],
    prompts: tuple[int, ...],
) -> dict[str, Times]:
    """Seconds of each variant, by what is measured."""
    model = shape.model()
    found: dict[str, Times] = {}
    for batch, context in eager_points:
        found[eager_name(batch, context)] = eager_times(model, shape, batch, context)
    captured_program = fxgraft.capture(model)
    program = fxgraft.compile(captured_program, ["optimize"], backend="torch", check=False).program
    del model, captured_program
    compiled = {
        name: compiled_of(shape, program, steps) for name, steps in shape.variants().items()
    }
    for batch, context in points:
        found[step_name(batch, context)] = decode_times(shape, compiled, batch, context)
    for batch in prompts:
        found[prompt_name(batch)] = prompt_times(shape, compiled, batch)
    return found


def step_name(batch: int, context: int) -> str:
    """What a decode step is called."""
    return f"decode, batch {batch}, context {context}"


def eager_name(batch: int, context: int) -> str:
    """What a step with the attention matrix is called."""
    return f"{step_name(batch, context)}, attention matrix"


def prompt_name(batch: int) -> str:
    """What taking in prompts is called."""
    return f"prompts, batch {batch}"


def eager_times(model: Any, shape: Shape, batch: int, context: int) -> Times:
    """Steps with the attention matrix, without and with suppression."""
    ways = {"plain": Suppression(), "suppressed": Suppression(int(0.95 * shape.heads), 0.08)}
    steps = {
        name: captured(EagerStep(model, shape, batch, context, way), shape.device)
        for name, way in ways.items()
    }
    return interleaved(steps, shape.device)


def decode_times(shape: Shape, compiled: dict[str, Any], batch: int, context: int) -> Times:
    """Captured steps of all variants, together where their states fit in memory, else in turn."""
    state = 2 * shape.layers * shape.width * shape.dtype.itemsize * batch * (context + 96)
    free = torch.cuda.mem_get_info()[0] if shape.device == "cuda" else 2**30
    names = list(compiled)
    together = [names] if 1.2 * state * len(names) < free else [[name] for name in names]
    found: Times = {}
    for group in together:
        engines = {name: engine_of(shape, compiled[name], batch, context) for name in group}
        steps = {name: step_of(engine, batch, context) for name, engine in engines.items()}
        found |= interleaved(steps, shape.device)
        del engines, steps
        release(shape.device)
    return found


def prompt_times(shape: Shape, compiled: dict[str, Any], batch: int) -> Times:
    """Whole prompts of all variants."""
    engines = {name: engine_of(shape, one, batch, shape.prompt) for name, one in compiled.items()}
    calls = {name: prompt_of(engine, shape, batch) for name, engine in engines.items()}
    found = interleaved(calls, shape.device)
    del engines, calls
    release(shape.device)
    return found


def interleaved(calls: dict[str, Callable[[], object]], device: str) -> Times:
    """Median seconds of each call, over rounds in which each has its turn."""
    seconds = replay_seconds if device == "cuda" else host_seconds
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS if device == "cuda" else 1):
        for name, call in calls.items():
            found[name].append(seconds(call, CALLS))
    return {name: statistics.median(times) for name, times in found.items()}


def host_seconds(call: Callable[[], object], count: int) -> float:
    """Median seconds of a call on the host."""
    call()
    times: list[float] = []
    for _ in range(min(count, 2)):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def release(device: str) -> None:
    """Give memory back before the next states are made."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def write(found: dict[str, Times], out: Path) -> None:
    """Write the figures."""
    rows: list[Any] = []
    for what, times in found.items():
        plain = times["plain"]
        rows.append(results.row(f"{what}: plain", 1e3 * plain, "ms"))
        for name, seconds in times.items():
            if name == "plain":
                continue
            target = target_of(what, name)
            over = 100 * (seconds / plain - 1)
            rows.append(results.row(f"{what}: {name}, over plain", over, "%", target=target))
    for one in rows:
        print(f"{one.metric}: {one.value:.4g} {one.unit}")
    notes = [
        "Llama of 7 B (32 layers, 32 heads of 128), bf16, random weights, 576 image keys.",
        "'attention matrix': own form of the authors' operations, in a CUDA graph.",
        "Heads are suppressed in all layers, rows 'last'.",
    ]
    results.write("spin_gpu", "spin", rows, out, notes=notes)


def target_of(what: str, name: str) -> float | None:
    """Most that a variant may cost, in percent; None where it is only reported."""
    if name == "keep 0.95, factor 0.08":
        return 1.0
    is_large = what.startswith("decode") and "batch 1," not in what
    return 0.0 if name == "keep 0.7, factor 0" and is_large else None


if __name__ == "__main__":
    main()
