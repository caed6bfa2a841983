"""SmolLM2-135M on the CPU: time per token, ours against transformers, same tokens.

Batch 1, a prompt of 128 tokens, 64 new tokens, fp32. Every path runs in a process of its own, one
after the other, so that none warms up another's caches. The floor is the time to read all weights
once at the machine's measured read bandwidth.

    python benchmarks/decode_cpu.py
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

import fxgraft
from fxgraft import results, sources
from fxgraft.frontends import sources as loading

PROMPT, NEW, REPEATS = 128, 64, 3
PATHS = (
    "transformers eager",
    "transformers static cache + torch.compile",
    "torch eager",
    "torch inductor",
    "onnx",
    "auto",
)


def main() -> None:
    """Run every path in a process of its own and write the result file."""
    if len(sys.argv) > 2 and sys.argv[1] == "--path":
        print(json.dumps(measure(sys.argv[2])))
        return
    found: dict[str, dict[str, Any]] = {}
    for path in PATHS:
        command = [sys.executable, __file__, "--path", path]
        with tempfile.TemporaryDirectory() as cache:  # compiled code of earlier runs does not count
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            output = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            ).stdout
        found[path] = json.loads(output.splitlines()[-1])
        print(f"{path:45} {found[path]['ms']:6.1f} ms/token, "
              f"ready after {found[path]['prepare']:.1f} s", flush=True)  # fmt: skip
    write(found)


def prompt() -> torch.Tensor:
    """A text of 128 tokens."""
    tokenizer = sources.tokenizer(sources.SMOLLM2)
    text = "The history of the city begins with a small market by the river. " * 20
    return tokenizer(text, return_tensors="pt")["input_ids"][:, :PROMPT]


def measure(path: str) -> dict[str, Any]:
    """Median time per token of one path, and the time until it was ready to decode."""
    torch.set_num_threads(2)
    ids = prompt()
    model = cast(Any, loading.load(sources.SMOLLM2).model).eval()
    start = time.perf_counter()
    generate = prepare(path, model)
    generate(ids, lambda: None)
    prepared = time.perf_counter() - start
    times: list[float] = []
    tokens: list[int] = []
    for _ in range(REPEATS):
        marks = [time.perf_counter()]
        tokens = generate(ids, lambda marks=marks: marks.append(time.perf_counter()))
        times += [b - a for a, b in itertools.pairwise(marks[2:])]
    return {
        "ms": statistics.median(times) * 1e3,
        "prepare": prepared,
        "tokens": tokens,
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "bandwidth": read_bandwidth(),
    }


Generate = Callable[[torch.Tensor, Callable[[], None]], list[int]]


def prepare(path: str, model: Any) -> Generate:
    """A function that generates and calls back at every token."""
    if path.startswith("transformers"):
        return transformers_path(model, "static" if "static" in path else None)
    program = fxgraft.compile(model, ["optimize"], backend="torch").program
    backend, _, mode = path.partition(" ")
    options = {"mode": mode} if mode else {}
    compiled = fxgraft.compile(program, backend=backend, options=options)

    def generate(ids: torch.Tensor, tick: Callable[[], None]) -> list[int]:
        result = compiled.generate(
            ids, max_new_tokens=NEW, eos_token_id=[], pad_token_id=0,
            on_token=lambda tokens, ended: tick(),
        )  # fmt: skip
        return result[0, PROMPT:].tolist()

    return generate


def transformers_path(model: Any, cache: str | None) -> Generate:
    """transformers' own ``generate``, with a streamer to see every token."""

    class Tick:
        def __init__(self, tick: Callable[[], None]) -> None:
            self.tick = tick

        def put(self, value: torch.Tensor) -> None:
            if value.numel() == 1:
                self.tick()

        def end(self) -> None:
            pass

    def generate(ids: torch.Tensor, tick: Callable[[], None]) -> list[int]:
        result = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
            eos_token_id=None, pad_token_id=0, streamer=Tick(tick), cache_implementation=cache,
        )  # fmt: skip
        return result[0, PROMPT:].tolist()

    if cache is not None:
        model.forward = torch.compile(model.forward, dynamic=False)
    return generate


def read_bandwidth() -> float:
    """Bytes per second of summing a tensor that fits no cache, best of ten."""
    data = torch.ones(128 * 2**20)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * 4 / best


def write(found: dict[str, dict[str, Any]]) -> None:
    """Check that all paths gave the same tokens, and write the figures."""
    eager, compiled = (found[path]["ms"] for path in PATHS[:2])
    bandwidth = max(entry["bandwidth"] for entry in found.values())
    floor = found[PATHS[0]]["bytes"] / bandwidth * 1e3
    bound = (f"reading the weights at {bandwidth / 1e9:.0f} GB/s", floor)
    same = sum(found[path]["tokens"] == found[PATHS[0]]["tokens"] for path in PATHS)
    best = min(found["torch eager"]["ms"], found["torch inductor"]["ms"])
    rows = [
        results.row("paths with the same 64 tokens", same, f"of {len(PATHS)}", target=len(PATHS),
                    better="higher"),
        results.row("torch eager", found["torch eager"]["ms"], "ms/token", bound=bound,
                    peer=("transformers eager", eager)),
        results.row("torch inductor", found["torch inductor"]["ms"], "ms/token", bound=bound,
                    peer=("transformers static cache + torch.compile", compiled)),
        results.row("onnx", found["onnx"]["ms"], "ms/token", bound=bound,
                    peer=("transformers eager", eager)),
        results.row("auto", found["auto"]["ms"], "ms/token", bound=bound,
                    peer=("transformers static cache + torch.compile", compiled)),
        results.row("speed-up of our best torch path", eager / best, "times", target=2.0,
                    better="higher", peer=("transformers compiled over eager", eager / compiled)),
        results.row("speed-up of the ONNX path", eager / found["onnx"]["ms"], "times", target=2.5,
                    better="higher", peer=("transformers compiled over eager", eager / compiled)),
        results.row("capture, optimize, compile, first 64 tokens: torch inductor",
                    found["torch inductor"]["prepare"], "s",
                    target=found[PATHS[1]]["prepare"], peer=(PATHS[1], found[PATHS[1]]["prepare"])),
        results.row("capture, optimize, export, first 64 tokens: onnx", found["onnx"]["prepare"],
                    "s", target=found[PATHS[1]]["prepare"],
                    peer=(PATHS[1], found[PATHS[1]]["prepare"])),
        results.row("time of auto to choose, first 64 tokens included", found["auto"]["prepare"],
                    "s", peer=(PATHS[1], found[PATHS[1]]["prepare"])),
    ]  # fmt: skip
    results.write("decode_cpu", "spine", rows, Path(__file__).parent / "results")


if __name__ == "__main__":
    main()
