"""The engine on one GPU: a Llama-2-7B shape with random weights in bf16, against transformers.

Decode steps of one stream and of many, their floor (all weights and the state read once at the
bandwidth of a device copy), the engine's own overhead, and transformers' ``generate`` with a
dynamic cache and with a static cache and ``torch.compile`` in the same run. Every path runs in a
process of its own.

    python benchmarks/engine_gpu.py
    python benchmarks/engine_gpu.py --plot     # draw the result again
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

HERE = Path(__file__).parent
PATHS = ("copy", "ours", "transformers dynamic", "transformers static + compile", "cold")
CONTEXTS = (512, 4096, 16384)
NEW = 64
STREAMS, PROMPT, OUTPUT = 64, 512, 256
SWEEP_BATCHES = (1, 2, 4, 8, 16, 32, 64)
SWEEP_CONTEXTS = (512, 2048, 8192)
Figures = dict[str, Any]


def main() -> None:
    """Run every path in a process of its own; the result file grows with each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--path", choices=PATHS, help="run one path here and print its figures")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result")
    parser.add_argument("--plot", action="store_true", help="draw the result that is in --out")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(arguments.out)
        return
    if arguments.path:
        print(json.dumps(RUN[arguments.path]()))
        return
    found: dict[str, Figures] = {}
    for path in PATHS:
        begun = time.perf_counter()
        result = subprocess.run(
            [sys.executable, __file__, "--path", path],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found[path] = json.loads(result.stdout.splitlines()[-1])
        print(f"{path}, {time.perf_counter() - begun:.0f} s: {json.dumps(found[path])}", flush=True)
        if "ours" in found:
            write(found, arguments.out)
    plot(arguments.out)


def device_copy() -> Figures:
    """Bytes per second of a copy on the device, read and written bytes both counted."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = replay_seconds(lambda: target.copy_(source), 20)
    return {"bandwidth": 2 * source.numel() / seconds}


def replay_seconds(call: Callable[[], object], count: int) -> float:
    """Median seconds of a call on the device, by events."""
    call()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def llama(layers: int = 32, device: str = "cuda") -> Any:
    """The shape of Llama-2-7B with random weights, and a context of 32 K tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=32768,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return cast(Any, model).eval()


def prompt_of(length: int, row: int = 0) -> list[int]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(row)
    return torch.randint(3, 32000, (length,), generator=generator).tolist()


def compiled_llama() -> Any:
    """Our compiled model."""
    import fxgraft

    return fxgraft.compile(llama(), ["optimize"], backend="triton", check=False)


def cold() -> Figures:
    """Ours from an empty process; kernels were compiled by the path ``ours`` before."""
    model = llama()

    def run(ids: torch.Tensor) -> None:
        import fxgraft

        compiled = fxgraft.compile(model, ["optimize"], backend="triton", check=False)
        compiled.generate(ids, max_new_tokens=2, eos_token_id=[])

    return {"seconds": first_token(run)}


def first_token(run: Callable[[torch.Tensor], object]) -> float:
    """Seconds from the model to its second token, the first that decodes; the prompt is 512."""
    ids = torch.tensor([prompt_of(512)], device="cuda")
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run(ids)
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def ours() -> Figures:
    """Every figure of the engine."""
    begun = time.perf_counter()
    compiled = compiled_llama()
    weights = sum(t.numel() * t.element_size() for _, t in compiled.program.weights())
    figures: Figures = {
        "weight_bytes": weights,
        "embedding_bytes": 32000 * 4096 * 2,
        "compile_seconds": time.perf_counter() - begun,
    }
    figures["batch 1"] = one_stream(compiled)
    figures["many"] = many_streams(compiled)
    figures["sweep"] = sweep(compiled)
    figures["kernels"] = {line.op: line.count for line in compiled.report().lines}
    return figures


def one_stream(compiled: Any) -> Figures:
    """Milliseconds per token of ``generate`` by context, as a user sees them."""
    figures: Figures = {}
    for context in CONTEXTS:
        ids = torch.tensor([prompt_of(context)], device="cuda")
        marks: list[float] = []

        def tick(tokens: Any, ended: Any, marks: list[float] = marks) -> None:
            marks.append(time.perf_counter())

        begun = time.perf_counter()
        for _ in range(2):
            marks.clear()
            begun = time.perf_counter()
            compiled.generate(ids, max_new_tokens=NEW, eos_token_id=[], on_token=tick)
        figures[str(context)] = {
            "ms": (marks[-1] - marks[3]) / (len(marks) - 4) * 1e3,
            "prefill_ms": (marks[0] - begun) * 1e3,
        }
    return figures


def many_streams(compiled: Any) -> Figures:
    """64 streams at once: the step with all of them running, and the same step replayed alone."""
    from fxgraft.generation.options import SamplingOptions
    from fxgraft.runtime.engine import Engine, EngineOptions

    options = EngineOptions(max_batch=STREAMS, max_context=PROMPT + OUTPUT + 16)
    engine = Engine(compiled, options)
    begun = time.perf_counter()
    engine.warm_up()
    warm = time.perf_counter() - begun
    sampling = SamplingOptions(max_new_tokens=OUTPUT, eos_token_id=())
    begun = time.perf_counter()
    requests = [engine.submit(prompt_of(PROMPT, row), sampling) for row in range(STREAMS)]
    steps: list[tuple[float, int, int]] = []
    while True:
        full = engine.batch.count == STREAMS and not engine.prefill.requests
        past = sum(request.past for request in engine.batch.requests)
        started = time.perf_counter()
        if not engine.step():
            break
        if full and engine.batch.count == STREAMS:
            steps.append((time.perf_counter() - started, past, STREAMS))
    elapsed = time.perf_counter() - begun
    steps = steps[4:]
    figures = {
        "warm_up_seconds": warm,
        "tokens_per_second": sum(len(r.tokens) for r in requests) / elapsed,
        "step_ms": statistics.mean(s for s, _, _ in steps) * 1e3,
        "step_ms_median": statistics.median(s for s, _, _ in steps) * 1e3,
        "steps": len(steps),
        "past_tokens": statistics.mean(p for _, p, _ in steps),
        "first_token_ms": statistics.median(
            (r.first_token - r.arrived) * 1e3 for r in requests if r.first_token
        ),
    }
    figures["replay_ms"] = replayed_ms(engine, STREAMS, round(figures["past_tokens"] / STREAMS))
    engine.close()
    return figures


def replayed_ms(engine: Any, rows: int, context: int) -> float:
    """Milliseconds of the captured step over rows of this context, without the engine around it."""
    batch = engine.batch
    pages = -(-(context + 64) // engine.options.block_size)
    for group, table in zip(engine.model.paged.groups, batch.tables, strict=True):
        count = len(group.layers) * rows * pages
        blocks = torch.randperm(count, device="cuda")[:count] + 1
        table[:, :rows, :pages] = blocks.view(len(group.layers), rows, pages).int()
    if rows not in batch._steps:
        batch.prepare(rows)

    def step() -> None:
        batch._steps[rows]()

    batch.past[:rows] = context
    seconds = replay_seconds(step, 32)
    batch.past.fill_(-1)
    return seconds * 1e3


def sweep(compiled: Any) -> list[Figures]:
    """Captured steps by batch and context, with as much state as fits."""
    from fxgraft.runtime.engine import Engine, EngineOptions

    rows: list[Figures] = []
    for context in SWEEP_CONTEXTS:
        torch.cuda.empty_cache()
        engine = Engine(
            compiled, EngineOptions(max_batch=64, max_context=context + 256, snapshots=0)
        )
        blocks = engine.memory.groups[0].total
        for batch in SWEEP_BATCHES:
            pages = -(-(context + 64) // engine.options.block_size)
            if batch * pages * 32 > blocks:
                continue
            ms = replayed_ms(engine, batch, context)
            state = batch * context * engine.model.paged.groups[0].block_bytes
            state = state * 32 / engine.options.block_size
            rows.append({"context": context, "batch": batch, "ms": ms, "state_bytes": state})
            print(rows[-1], file=sys.stderr, flush=True)
        engine.close()
        del engine
    return rows


def transformers_dynamic() -> Figures:
    """transformers as most people call it."""
    return transformers_ms(llama(), None, (512, 16384))


def transformers_static() -> Figures:
    """transformers with a static cache, which it compiles."""
    model = llama()

    def run(ids: torch.Tensor) -> None:
        model.generate(ids, max_new_tokens=2, min_new_tokens=2, cache_implementation="static")

    seconds = first_token(run)
    return {"first_token_seconds": seconds, **transformers_ms(model, "static", (512,))}


def transformers_ms(model: Any, cache: str | None, contexts: tuple[int, ...]) -> Figures:
    """Milliseconds per token by context."""
    figures: Figures = {}
    for context in contexts:
        ids = torch.tensor([prompt_of(context)], device="cuda")
        options: Figures = {"cache_implementation": cache} if cache else {}

        def run(count: int, ids: Any = ids, options: Figures = options) -> float:
            torch.cuda.synchronize()
            begun = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                **options,
            )
            torch.cuda.synchronize()
            return time.perf_counter() - begun

        run(8)
        short, long = run(8), run(8 + NEW)
        figures[str(context)] = {"ms": (long - short) / NEW * 1e3}
    return figures


RUN: dict[str, Callable[[], Figures]] = {
    "copy": device_copy,
    "ours": ours,
    "cold": cold,
    "transformers dynamic": transformers_dynamic,
    "transformers static + compile": transformers_static,
}


def write(found: dict[str, Figures], folder: Path) -> None:
    """The result file."""
    from fxgraft.results import row
    from fxgraft.results import write as write_results

    bandwidth = found["copy"]["bandwidth"]
    ours_ = found["ours"]
    dynamic = found.get("transformers dynamic", {})
    static = found.get("transformers static + compile", {})
    # Of the embedding a step reads one row per stream.
    weights = ours_["weight_bytes"] - ours_["embedding_bytes"]
    per_token = 2 * 32 * 4096 * 2
    rows = [row("device copy", bandwidth / 1e12, "TB/s", better="higher")]
    targets = {"512": 4.9, "4096": None, "16384": 7.9}
    for context, figures in ours_["batch 1"].items():
        floor = (weights + (int(context) + NEW / 2) * per_token) / bandwidth * 1e3
        peer = static.get(context) or dynamic.get(context)
        name = "transformers static cache + torch.compile" if context in static else (
            "transformers dynamic cache"
        )  # fmt: skip
        rows.append(
            row(
                f"one stream, context {context}: per token",
                figures["ms"],
                "ms",
                target=targets.get(context),
                peer=(name, peer["ms"]) if peer else None,
                bound=("weights and state read once", floor),
            )
        )
        if context in static and context in dynamic:
            times = dynamic[context]["ms"] / figures["ms"]
            rows.append(row(f"one stream, context {context}: against generate with a dynamic "
                            "cache", times, "times", target=9.0, better="higher"))  # fmt: skip
            times = static[context]["ms"] / figures["ms"]
            metric = f"one stream, context {context}: against a static cache and torch.compile"
            rows.append(row(metric, times, "times", target=1.75, better="higher"))
    many = ours_["many"]
    floor = (weights + many["past_tokens"] * per_token) / bandwidth * 1e3
    rows += [
        row(
            f"{STREAMS} streams, prompts {PROMPT}, outputs {OUTPUT}: step of all",
            many["step_ms"],
            "ms",
            target=floor / 0.9,
            bound=("weights and state read once", floor),
        ),
        row(
            f"{STREAMS} streams: what the engine adds to its step",
            (many["step_ms"] / many["replay_ms"] - 1) * 100,
            "%",
            target=3.0,
        ),
        row(f"{STREAMS} streams: tokens per second, prompts included",
            many["tokens_per_second"], "1/s", better="higher"),
        row(f"{STREAMS} streams at once: median time to first token",
            many["first_token_ms"], "ms"),
    ]  # fmt: skip
    if "cold" in found and "first_token_seconds" in static:
        rows.append(row("from the model to its first decoded token, empty process, kernels cached",
                        found["cold"]["seconds"], "s", target=static["first_token_seconds"],
                        peer=("transformers static cache + torch.compile",
                              static["first_token_seconds"])))  # fmt: skip
    for point in ours_.get("sweep", []):
        floor = (weights + point["state_bytes"]) / bandwidth * 1e3
        metric = f"step of {point['batch']} streams at context {point['context']}"
        bound = ("weights and state read once", floor)
        rows.append(row(metric, point["ms"], "ms", bound=bound))
    write_results("engine_gpu", "engine", rows, folder)


def plot(folder: Path) -> None:
    """Latency and tokens per second of a step against batch and context, with the floor."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows: dict[int, list[tuple[int, float, float]]] = {}
    for one in json.loads((folder / "engine_gpu.json").read_text())["rows"]:
        found = re.fullmatch(r"step of (\d+) streams at context (\d+)", one["metric"])
        if found:
            point = (int(found[1]), one["value"], one["bound"]["value"])
            rows.setdefault(int(found[2]), []).append(point)
    figure, (latency, rate) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for context, points in sorted(rows.items()):
        batches = [batch for batch, _, _ in points]
        [line] = latency.plot(batches, [ms for _, ms, _ in points], "o-", label=f"{context} tokens")
        colour = line.get_color()
        latency.plot(batches, [floor for _, _, floor in points], "--", color=colour)
        rate.plot(batches, [b / ms * 1e3 for b, ms, _ in points], "o-", color=colour)
        rate.plot(batches, [b / floor * 1e3 for b, _, floor in points], "--", color=colour)
    for axes, name in ((latency, "milliseconds per step"), (rate, "tokens per second")):
        axes.set(xscale="log", yscale="log", xlabel="streams", ylabel=name)
        axes.set_xticks(SWEEP_BATCHES, [str(batch) for batch in SWEEP_BATCHES])
        axes.grid(alpha=0.3)
    latency.legend(title="context of each stream")
    figure.suptitle("Decode step, Llama-2-7B shape, bf16; dashed: weights and state read once")
    figure.tight_layout()
    figure.savefig(folder / "engine_gpu.svg", metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
