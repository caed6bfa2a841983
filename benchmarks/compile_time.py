"""What compiling costs: a real model cold, more layers, a 7B shape on the meta device, passes.

python benchmarks/compile_time.py
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

import fxgraft
from fxgraft import results, sources

HERE = Path(__file__).parent
LAYERS = (4, 16, 64)


def main() -> None:
    """Run each measurement in a process of its own and write the result file."""
    if len(sys.argv) > 2 and sys.argv[1] == "--part":
        print(json.dumps(PARTS[sys.argv[2]]()))
        return
    found: dict[str, Any] = {}
    for part in PARTS:
        command = [sys.executable, __file__, "--part", part]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[part] = json.loads(output.splitlines()[-1])
        print(part, found[part], flush=True)
    write(found)


def llama(layers: int, **changes: Any) -> Any:
    """A Llama of small width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "num_hidden_layers": layers,
    }  # fmt: skip
    return cast(Any, LlamaForCausalLM)(LlamaConfig(**cast(Any, {**config, **changes}))).eval()


def cold() -> dict[str, float]:
    """``compile()`` of SmolLM2 with three passes, from import to a lowered model."""
    vector = HERE.parent / "out" / "benchmark_vector.safetensors"
    vector.parent.mkdir(exist_ok=True)
    from fxgraft.passes.seal import Seal, SteeringVector

    SteeringVector(torch.randn(576), "E-RT", 15, sources.SMOLLM2).save(vector)
    seal = Seal(vector=vector, tokenizer=sources.SMOLLM2)
    start = time.perf_counter()
    compiled = fxgraft.compile(
        sources.SMOLLM2, ["optimize", {"prune_heads": {"sparsity": 0.03}}, seal], backend="torch"
    )
    seconds = time.perf_counter() - start
    checks = sum(record.check_seconds for record in compiled.program.history)
    return {"seconds": seconds, "checks": checks}


def per_layer() -> dict[str, float]:
    """Seconds of capture and ``optimize`` for several depths, after one small model."""
    fxgraft.compile(llama(1), ["optimize"], backend="torch")
    found: dict[str, float] = {}
    for layers in LAYERS:
        model = llama(layers)
        start = time.perf_counter()
        fxgraft.compile(model, ["optimize"], backend="torch")
        found[str(layers)] = time.perf_counter() - start
    return found


def meta_7b() -> dict[str, float]:
    """Capture of the Llama-2-7B shape on the meta device: peak memory and time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000,
    )  # fmt: skip
    with torch.device("meta"):
        model = cast(Any, LlamaForCausalLM)(config).eval()
    start = time.perf_counter()
    program = fxgraft.capture(model)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak": peak / 2**30, "parameters": program.count_parameters()}


def passes() -> dict[str, float]:
    """Each pass on a 32-layer graph, without its numeric check."""
    from fxgraft.passes.seal import automaton

    small = fxgraft.capture(llama(1))
    fxgraft.Pipeline.parse(["optimize", {"prune_heads": {"sparsity": 0.25}}]).run(small)
    program = fxgraft.capture(llama(32))
    found: dict[str, float] = {}
    for name, item in (
        ("optimize", "optimize"),
        ("prune_heads", {"prune_heads": {"sparsity": 0.25}}),
    ):
        pipeline = fxgraft.Pipeline.parse([item])
        start = time.perf_counter()
        pipeline.run(program, check=False)  # contracts, copy, rewrite, diff, cost, record
        found[name] = time.perf_counter() - start
    start = time.perf_counter()
    automaton.build([bytes([n % 256]) * 3 for n in range(49152)], "<think>", "</think>")
    found["seal: automaton over 49,152 tokens"] = time.perf_counter() - start
    return found


PARTS: dict[str, Callable[[], dict[str, float]]] = {
    "cold": cold, "per_layer": per_layer, "meta_7b": meta_7b, "passes": passes,
}  # fmt: skip


def write(found: dict[str, Any]) -> None:
    """Write the figures."""
    times = [found["per_layer"][str(layers)] for layers in LAYERS]
    slopes = [
        (times[i + 1] - times[i]) / (LAYERS[i + 1] - LAYERS[i]) for i in range(len(LAYERS) - 1)
    ]
    rows = [
        results.row("cold compile() of SmolLM2 with optimize, prune_heads and seal",
                    found["cold"]["seconds"], "s", target=20.0),
        results.row("of it, numeric checks", found["cold"]["checks"], "s"),
        *(results.row(f"capture, optimize and check, {layers} layers", seconds, "s")
          for layers, seconds in zip(LAYERS, times, strict=True)),
        results.row("time per added layer, 4 to 16 layers", slopes[0], "s/layer"),
        results.row("time per added layer, 16 to 64 layers", slopes[1], "s/layer"),
        results.row("the second over the first", slopes[1] / slopes[0], "times", target=1.1),
        results.row("peak memory of capturing a Llama-2-7B shape on meta",
                    found["meta_7b"]["peak"], "GiB", target=2.0,
                    bound=("its weights in bf16", found["meta_7b"]["parameters"] * 2 / 2**30)),
        results.row("time of capturing it", found["meta_7b"]["seconds"], "s"),
        *(results.row(f"pass over 32 layers: {name}", seconds, "s", target=1.0)
          for name, seconds in found["passes"].items()),
    ]  # fmt: skip
    results.write("compile_time", "spine", rows, HERE / "results")


if __name__ == "__main__":
    main()
