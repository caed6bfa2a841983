"""What steering costs on one GPU: Qwen2-1.5B's shape, random weights in bf16, 256 requests.

    python benchmarks/seal_gpu.py

The engine's captured decode step: plain, with one steered layer or all of them, and with one vector
or a different one for each request; their rounds are interleaved. Beside it the way of hooks on the
original model (the host asks at each step whether any row fires), with its own plain step. And how
often the host waits for the device in a captured step, by the profiler.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from _seal_reasoner import tokenizer
from engine_gpu import replay_seconds

import fxgraft
from fxgraft import results
from fxgraft.passes.seal import Seal, SteeringVector
from fxgraft.runtime.engine import Engine, EngineOptions

HERE = Path(__file__).parent
FOLDER = HERE.parent / "out" / "seal_gpu"
BATCH, CONTEXT, ROUNDS, HOOK_ROUNDS = 256, 512, 12, 6
LAYERS, WIDTH, VOCABULARY = 28, 1536, 151936
LAYER = 20


@dataclass(frozen=True)
class Variant:
    """A way to steer.

    Attributes:
        layers: where.
        vectors: how many different ones the requests take; 0 is the plain model.
    """

    layers: tuple[int, ...]
    vectors: int


EVERY = tuple(range(LAYERS))
VARIANTS = {
    "plain": Variant((), 0),
    "one layer, one vector": Variant((LAYER,), 1),
    "one layer, 256 vectors": Variant((LAYER,), BATCH),
    "all layers, one vector": Variant(EVERY, 1),
    "all layers, 256 vectors": Variant(EVERY, BATCH),
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result")
    out = parser.parse_args().out
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokenizer().save_pretrained(FOLDER)
    model = qwen2()
    hooks = hooked(model)
    print("hooks", hooks, flush=True)
    program = fxgraft.capture(model)
    engines = {name: engine_of(program, variant) for name, variant in VARIANTS.items()}
    steps = {name: step_of(engine) for name, engine in engines.items()}
    times = interleaved(steps)
    waits = {name: host_waits(step) for name, step in steps.items()}
    write(times, waits, hooks, out)


def qwen2() -> Any:
    """The shape of Qwen2-1.5B with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=8960,
        num_hidden_layers=LAYERS, num_attention_heads=12, num_key_value_heads=2,
        max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = cast(Any, Qwen2ForCausalLM)(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def vector_file(seed: int) -> Path:
    """A random vector."""
    path = FOLDER / f"vector_{seed}.safetensors"
    values = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(values, "E-RT", LAYER, "").save(path)


def engine_of(program: fxgraft.Program, variant: Variant) -> Engine:
    """An engine with room for the whole batch; each row has its vector."""
    passes: list[Any] = ["optimize"]
    if variant.vectors:
        vectors = {f"v{seed}": vector_file(seed) for seed in range(variant.vectors)}
        passes.append(Seal(vectors=vectors, layer=variant.layers, tokenizer=str(FOLDER)))
    compiled = fxgraft.compile(program, passes, backend="triton", check=False)
    tokens = BATCH * (CONTEXT + 64)
    state_bytes = tokens * LAYERS * 2 * 2 * 128 * 2
    options = EngineOptions(
        max_batch=BATCH, max_context=CONTEXT + 64, memory_bytes=int(1.2 * state_bytes), snapshots=0
    )
    engine = Engine(compiled, options)
    if variant.vectors:
        rows = torch.arange(BATCH, device="cuda") % variant.vectors + 1
        engine.batch.inputs["seal_vector"].copy_(rows)
    return engine


def step_of(engine: Engine) -> Callable[[], object]:
    """The captured step over all rows, each with ``CONTEXT`` tokens before it."""
    batch = engine.batch
    pages = -(-(CONTEXT + 64) // engine.options.block_size)
    for group, table in zip(engine.model.paged.groups, batch.tables, strict=True):
        count = len(group.layers) * BATCH * pages
        blocks = torch.randperm(count, device="cuda") + 1
        table[:, :, :pages] = blocks.view(len(group.layers), BATCH, pages).int()
    batch.slots.copy_(torch.arange(1, BATCH + 1, device="cuda"))
    run = batch.prepare(BATCH)

    def step() -> None:
        batch.past.fill_(CONTEXT)
        run()

    return step


def interleaved(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each step, over rounds in which each has its turn."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            found[name].append(replay_seconds(step, 20))
    return {name: statistics.median(times) for name, times in found.items()}


def host_waits(step: Callable[[], object], count: int = 16) -> int:
    """Calls in which the host waits for the device, or copies from it, in so many steps."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(count):
            step()
    names = [event.name for event in profile.events() or []]
    words = ("StreamSynchronize", "EventSynchronize", "Memcpy DtoH")
    return sum(any(word in name for word in words) for name in names)


@torch.no_grad()
def hooked(model: Any) -> dict[str, float]:
    """Seconds per decode step of the original, plain and steered by a hook that asks the host."""
    from transformers import DynamicCache

    ids = torch.randint(0, VOCABULARY, (BATCH, CONTEXT), device="cuda")
    vector = torch.randn(WIDTH, device="cuda", dtype=torch.bfloat16)
    breaks = torch.tensor([10, 14, 198], device="cuda")
    token = ids[:, -1:]

    def steer(module: Any, inputs: tuple[Any, ...]) -> Any:
        fires = torch.isin(token[:, 0], breaks)
        if not bool(fires.any()):
            return None
        hidden = inputs[0].clone()
        hidden[fires, -1] += vector
        return (hidden, *inputs[1:])

    cache = DynamicCache(config=model.config)
    for start in range(0, CONTEXT, 64):
        model(ids[:, start : start + 64], past_key_values=cache, logits_to_keep=1)
    found: dict[str, list[float]] = {"plain": [], "steered": []}
    for _ in range(HOOK_ROUNDS):
        for way, times in found.items():
            handle = model.model.layers[LAYER].register_forward_pre_hook(steer)
            if way == "plain":
                handle.remove()
            times.append(replay_seconds(lambda: model(token, past_key_values=cache), 4))
            handle.remove()
    torch.cuda.empty_cache()
    # The first round also loads kernels.
    return {way: statistics.median(times[1:]) for way, times in found.items()}


def write(
    times: dict[str, float], waits: dict[str, int], hooks: dict[str, float], out: Path
) -> None:
    """Write the figures."""
    plain = times["plain"]
    over = {name: 100 * (seconds / plain - 1) for name, seconds in times.items()}
    published = ("EasySteer, published, another GPU", 10.8), ("the same, all layers", 23.8)
    rows = [
        results.row("decode step, plain", 1e3 * plain, "ms"),
        results.row("steering one layer, over plain", over["one layer, one vector"], "%",
                    target=0.5, peer=published[0]),
        results.row("steering all layers, over plain", over["all layers, one vector"], "%",
                    target=2.0, peer=published[1]),
        *(results.row(f"256 vectors over one, {place}",
                      100 * (times[f"{place}, 256 vectors"] / times[f"{place}, one vector"] - 1),
                      "%", target=1.0) for place in ("one layer", "all layers")),
        results.row("waits of the host in 16 steered steps, more than in plain ones",
                    max(waits.values()) - waits["plain"], "calls", target=0.0),
        results.row("waits of the host in 16 steered steps", max(waits.values()), "calls",
                    target=0.0),
        results.row("decode step of transformers, plain", 1e3 * hooks["plain"], "ms"),
        results.row("hook that asks the host, over that",
                    100 * (hooks["steered"] / hooks["plain"] - 1), "%"),
    ]  # fmt: skip
    every = {name: round(1e3 * seconds, 4) for name, seconds in times.items()}
    notes = [
        f"Batch {BATCH}, context {CONTEXT}, bf16, random weights of Qwen2-1.5B's shape.",
        f"Median ms per step: {every}.",
    ]
    for one in rows:
        print(f"{one.metric}: {one.value:.4g} {one.unit}")
    results.write("seal_gpu", "seal", rows, out, notes=notes)


if __name__ == "__main__":
    main()
