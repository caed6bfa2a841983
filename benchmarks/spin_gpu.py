"""What suppressing heads costs on one GPU: a Llama of 7 B, random weights in bf16, 576 image keys.

    python benchmarks/spin_gpu.py
    python benchmarks/spin_gpu.py --tiny     # a toy on the CPU: does it run? writes nothing

The engine's captured decode step, plain and with ``spin`` in three ways, rounds interleaved where
memory allows; the same step with the attention matrix written out, as the authors' code has it, in
a CUDA graph and without one; and prompts of 641 tokens. The result file grows with each point.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
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
WORKERS = 8
SOFT, HARD, MASS = "keep 0.95, factor 0.08", "keep 0.7, factor 0", "mass, keep 0.95, factor 0.08"
# Percent over plain, by batch and context.
HARD_TARGETS = {(32, 704): -5.0, (16, 4096): -12.0}
Times = dict[str, float]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result")
    parser.add_argument("--tiny", action="store_true", help="a toy on the CPU; writes nothing")
    arguments = parser.parse_args()
    if arguments.tiny:
        small = ((1, 24), (3, 40))
        for name, times in measure(TINY, small, small[:1], (2,)):
            print(name, times)
        return
    begun, found = time.perf_counter(), dict[str, Times]()
    prepare(Shape())
    print(f"kernels compiled, {time.perf_counter() - begun:.0f} s", flush=True)
    for name, times in measure(Shape(), POINTS, EAGER_POINTS, PROMPTS):
        found[name] = times
        shown = {way: f"{1e3 * seconds:.3f} ms" for way, seconds in times.items()}
        print(f"{name}, {time.perf_counter() - begun:.0f} s: {shown}", flush=True)
        write(found, arguments.out)


def prepare(shape: Shape) -> None:
    """Compile the kernels in processes of their own, on a model of one layer."""
    one = replace(shape, layers=1, vocabulary=64)
    cases = [(one, name, *point) for name in one.variants() for point in POINTS]
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*cases, strict=True)))


def _compile(shape: Shape, name: str, batch: int, context: int) -> None:
    program = program_of(shape)
    step_of(engine_of(shape, compiled_of(shape, program, shape.variants()[name]), batch, context),
            batch, context)()  # fmt: skip


def program_of(shape: Shape, model: Any = None) -> fxgraft.Program:
    """The model's graph with merged projections."""
    captured_program = fxgraft.capture(shape.model() if model is None else model)
    return fxgraft.compile(captured_program, ["optimize"], backend="torch", check=False).program


def measure(
    shape: Shape,
    points: tuple[tuple[int, int], ...],
    eager_points: tuple[tuple[int, int], ...],
    prompts: tuple[int, ...],
) -> Iterator[tuple[str, Times]]:
    """Seconds of each variant, by what is measured."""
    model = shape.model()
    for batch, context in eager_points:
        yield eager_name(batch, context), eager_times(model, shape, batch, context)
        release(shape.device)
    program = program_of(shape, model)
    del model
    release(shape.device)
    compiled = {
        name: compiled_of(shape, program, steps) for name, steps in shape.variants().items()
    }
    for batch, context in points:
        yield step_name(batch, context), decode_times(shape, compiled, batch, context)
    for batch in prompts:
        yield prompt_name(batch), prompt_times(shape, compiled, batch)


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
    suppressed = EagerStep(model, shape, batch, context, Suppression(int(0.95 * shape.heads), 0.08))
    plain = replace(suppressed, suppression=Suppression())
    steps: dict[str, Callable[[], object]] = {
        "plain": captured(plain, shape.device),
        "suppressed": captured(suppressed, shape.device),
        "plain, no graph": plain,
        "suppressed, no graph": suppressed,
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
    """Whole prompts of all variants, in CUDA graphs."""
    engines = {name: engine_of(shape, one, batch, shape.prompt) for name, one in compiled.items()}
    calls = {
        name: captured(prompt_of(engine, shape, batch), shape.device)
        for name, engine in engines.items()
    }
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
    """Write the figures that are there."""
    rows: list[results.Row] = []
    for what, times in found.items():
        plain = times["plain"]
        rows.append(results.row(f"{what}: plain", 1e3 * plain, "ms"))
        for name, seconds in times.items():
            if name != "plain":
                over = 100 * (seconds / plain - 1)
                target = target_of(what, name)
                rows.append(results.row(f"{what}: {name}, over plain", over, "%", target=target))
    rows += [row for point in EAGER_POINTS for row in against_eager(found, point)]
    shape = Shape()
    sums = 4 * shape.layers * shape.width / 2**20
    rows.append(results.row("more memory per sequence", sums, "MiB", target=0.5))
    notes = [
        "Llama of 7 B (32 layers, 32 heads of 128), bf16, random weights, 576 image keys.",
        "'attention matrix': own form of the authors' operations.",
        "Heads are suppressed in all layers, rows 'last'.",
    ]
    results.write("spin_gpu", "spin", rows, out, notes=notes)


def against_eager(found: dict[str, Times], point: tuple[int, int]) -> Iterator[results.Row]:
    """How many times faster ours suppresses than the authors' operations."""
    ours, eager = found.get(step_name(*point)), found.get(eager_name(*point))
    if ours is None or eager is None:
        return
    for way, target in (("suppressed", 1.2), ("suppressed, no graph", 4.0)):
        metric = f"{step_name(*point)}: times faster than with the attention matrix, {way}"
        yield results.row(metric, eager[way] / ours[SOFT], "×", target=target, better="higher")


def target_of(what: str, name: str) -> float | None:
    """Most that a variant may cost, in percent; None where it is only reported."""
    if name == HARD:
        return next((t for point, t in HARD_TARGETS.items() if what == step_name(*point)), None)
    is_step = "attention matrix" not in what
    return {SOFT: 1.0, MASS: 2.0}.get(name) if is_step else None


if __name__ == "__main__":
    main()
