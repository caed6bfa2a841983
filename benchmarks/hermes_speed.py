"""How fast the simulator is: requests, memory, exactness of jumps, step prices, costs of a Program.

4,000 requests with lengths like the public Azure trace of conversations, Poisson arrivals of 3/s,
Llama-3.1-8B on one H100, chunks of 512 tokens, 128 sequences, all logs and figures. Times are of
the process's CPU, as the simulator is one thread. Every part runs in a process of its own.

    python benchmarks/hermes_speed.py [--out FOLDER] [--peer PYTHON]

The peer for step prices, AIConfigurator's native estimator, is installed into a temporary
environment, unless a Python that has ``aiconfigurator-core`` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fxgraft import results

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "systems" / "conversation.yaml"
PACKAGE = "aiconfigurator-core==0.12.0"
REQUESTS, MILLION, REPEATS = 4000, 1_000_000, 5
PRICES, GRID_POINTS, COUNTED = 100_000, 1000, 3
Figures = dict[str, Any]


def main() -> None:
    """Run every part in a process of its own and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="run one part here and print its figures")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result")
    parser.add_argument("--peer", type=Path, help="Python that has aiconfigurator-core")
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part]()))
        return
    found: Figures = {}
    # Idle threads that spin would count as CPU time.
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in PARTS:
        command = [sys.executable, __file__, "--part", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name] = json.loads(output.splitlines()[-1])
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    found["peer"] = peer(options.peer)
    print(f"peer: {json.dumps(found['peer'])}", flush=True)
    write(found, options.out)


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of a call."""
    begun = time.process_time()
    call()
    return time.process_time() - begun


def speed() -> Figures:
    """4,000 requests, all logs kept and all figures computed."""
    from fxgraft.runtime.hermes import System

    system = System.read(EXAMPLE, {"workloads.0.requests": REQUESTS})
    run = system.simulate()
    _ = run.summary
    seconds = [cpu_seconds(lambda: system.simulate().summary) for _ in range(REPEATS)]
    steps = run.tables["steps"]["steps"].sum()
    return {"seconds": statistics.median(seconds), "all": seconds, "steps": int(steps),
            "utilisation": run.clients[0]["utilisation"]}  # fmt: skip


def exactness() -> Figures:
    """Largest difference of any logged figure of a request, jumping and step by step.

    Relative, and in seconds where the figure is below one: waits are differences of clock times.
    """
    from fxgraft.runtime.hermes import System

    system = System.read(EXAMPLE, {"workloads.0.requests": REQUESTS})
    fast = system.simulate()
    slow_seconds = cpu_seconds(lambda: system.simulate(stepwise=True))
    slow = system.simulate(stepwise=True)
    largest = 0.0
    for name in fast.requests:
        pair = [run.requests[name][np.argsort(run.requests["request"])] for run in (fast, slow)]
        scale = np.maximum(np.abs(pair[1]), 1.0)
        largest = max(largest, float((np.abs(pair[0] - pair[1]) / scale).max()))
    return {"largest": largest, "stepwise_seconds": slow_seconds}


def million() -> Figures:
    """A million requests, only their own log kept."""
    from fxgraft.runtime.hermes import System

    changes = {"workloads.0.requests": MILLION, "logs": ["requests"]}
    system = System.parse(_with_logs(changes))
    begun = time.perf_counter()
    seconds = cpu_seconds(lambda: system.simulate().summary)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "wall": time.perf_counter() - begun, "bytes": kibibytes * 1024}


def _with_logs(changes: Figures) -> object:
    """The example's content with a key that it does not have."""
    import yaml

    content = yaml.safe_load(EXAMPLE.read_text())
    content["logs"] = changes["logs"]
    content["workloads"][0]["requests"] = changes["workloads.0.requests"]
    return content


def sizes() -> list[tuple[int, int]]:
    """Random numbers of decodes, and their mean contexts."""
    source = random.Random(0)
    return [(source.randrange(1, 128), source.randrange(128, 4096)) for _ in range(PRICES)]


def prices() -> Figures:
    """Prices per second, of steps with a chunk of 512 tokens and of decodes alone."""
    from fxgraft.devices import device
    from fxgraft.runtime.hermes.dense import MODELS, DenseCost
    from fxgraft.runtime.hermes.dense_table import dense_table

    cost = DenseCost(MODELS["qwen3-32b"], device("h100-sxm"), "bfloat16", devices=2)
    found: Figures = {}
    for name, one in (("table", dense_table(cost, "qwen3-32b").pricer()), ("formula", cost)):
        steps = [(decodes, decodes * context) for decodes, context in sizes()]
        chunk = [(512, 0)]

        def mixed(price: Any = one.price, steps: Any = steps, chunk: Any = chunk) -> None:
            for decodes, context in steps:
                price(chunk, decodes, context)

        def decode(price: Any = one.price, steps: Any = steps) -> None:
            for decodes, context in steps:
                price((), decodes, context)

        for kind, call in (("mixed", mixed), ("decode", decode)):
            call()
            seconds = statistics.median(cpu_seconds(call) for _ in range(REPEATS))
            found[f"{name} {kind}"] = PRICES / seconds
    return found


def grid() -> Figures:
    """Cost of a 32-layer Program at 1,000 points; torch's counter at some of them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    import fxgraft

    torch.set_num_threads(1)
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
            )
        )  # fmt: skip
    program = fxgraft.capture(model)
    batch, length = np.arange(1, GRID_POINTS + 1), np.arange(1, GRID_POINTS + 1) * 8
    ours = statistics.median(
        cpu_seconds(lambda: program.cost().evaluate(batch=batch, sequence=length))
        for _ in range(REPEATS)
    )

    def count(point: int) -> None:
        rows, tokens = int(batch[point]), int(length[point])
        ids = torch.ones(rows, tokens, dtype=torch.int64, device="meta")
        mask = torch.zeros(rows, 1, tokens, tokens, device="meta")  # made here, it is not looked at
        with FlopCounterMode(display=False), torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False)

    count(0)
    each = statistics.median(cpu_seconds(lambda p=p: count(p)) for p in range(1, COUNTED + 1))
    return {"seconds": ours, "torch_each": each}


def peer(python: Path | None) -> Figures:
    """AIConfigurator's prices per second, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return _peer(python or _installed(Path(folder)), Path(folder))
        except (subprocess.CalledProcessError, OSError) as error:
            return {"missing": f"{PACKAGE} could not be installed or run: {error}"}


def _installed(folder: Path) -> Path:
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", PACKAGE], check=True)
    return python


def _peer(python: Path, folder: Path) -> Figures:
    file = folder / "sizes.json"
    file.write_text(json.dumps(sizes()[: PRICES // 5]))
    script = HERE / "_aiconfigurator.py"
    output = subprocess.run([python, script, file], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def write(found: Figures, folder: Path) -> None:
    """The result file."""
    row, estimator = results.row, found["peer"]
    name = "AIConfigurator's native estimator"
    others = {kind: (name, estimator[kind]) if kind in estimator else None
              for kind in ("mixed", "decode")}  # fmt: skip
    rows = [
        row(f"{REQUESTS:,} requests, all logs and figures", REQUESTS / found["speed"]["seconds"],
            "requests/s", better="higher", target=15_000.0,
            peer=("its own steps one by one", REQUESTS / found["exactness"]["stepwise_seconds"])),
        row("largest difference of any request's figure to step by step, relative or in seconds",
            found["exactness"]["largest"], "", target=1e-9),
        row("a million requests, figures included", found["million"]["seconds"], "s",
            target=90.0),
        row("a million requests: peak memory", found["million"]["bytes"] / 2**30, "GiB",
            target=1.0),
        row("step prices, a chunk of 512 and decodes, from a table", found["prices"]["table mixed"],
            "1/s", better="higher", target=100_000.0, peer=others["mixed"]),
        row("step prices, decodes alone, from a table", found["prices"]["table decode"],
            "1/s", better="higher", target=100_000.0, peer=others["decode"]),
        row("step prices, a chunk of 512 and decodes, from a formula",
            found["prices"]["formula mixed"], "1/s", better="higher", target=100_000.0,
            peer=others["mixed"]),
        row(f"cost of a 32-layer Program at {GRID_POINTS:,} points", found["grid"]["seconds"], "s",
            target=1.0, peer=("torch.utils.flop_counter, meta tensors",
                              found["grid"]["torch_each"] * GRID_POINTS)),
    ]  # fmt: skip
    notes = [
        "CPU time of one process; medians of five runs, the million once. "
        f"{found['speed']['steps']:,} steps of the engine at a utilisation of "
        f"{found['speed']['utilisation']:.2f}.",
        f"Torch's counter was run at {COUNTED} points and scaled to {GRID_POINTS:,}.",
        "No package of Vidur was found; 60 to 237 requests/s were measured earlier on two cores.",
    ]
    if "missing" in estimator:
        notes.append(f"{estimator['missing']}; 21,000 prices/s were measured earlier.")
    results.write("hermes_speed", "hermes", rows, folder, notes=notes)


PARTS: dict[str, Callable[[], Figures]] = {
    "speed": speed, "exactness": exactness, "million": million, "prices": prices, "grid": grid,
}  # fmt: skip


if __name__ == "__main__":
    main()
