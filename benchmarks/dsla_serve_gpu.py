"""DSLA while serving, on one GPU: a Llama-2-7B shape with random weights in bf16.

    python benchmarks/dsla_serve_gpu.py
    python benchmarks/dsla_serve_gpu.py --parts steps fold
    python benchmarks/dsla_serve_gpu.py --smoke     # a tiny model on a CPU, prints only

* steps: captured decode steps at levels 0 to 100 % of the layers, by batch and context, against the
  bytes that each must move (weights, keys and values, states) at the bandwidth of a device copy.
* fold: seconds of folding 4 requests of 16 K tokens in 16 layers, the allocator's calls on the
  way, and the largest gap between tokens.
* crunch: Poisson arrivals of the paper's mix of prompt lengths until memory is short, with the
  policy and without; latency per token, preemptions, and what the policy costs where nothing is
  short.

Every part runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _engine_load
import engine_gpu
import numpy as np
import torch
from _engine_load import Arrival

import fxgraft
from fxgraft import results
from fxgraft.generation import SamplingOptions
from fxgraft.passes.dsla import Dsla
from fxgraft.passes.dsla.levels import at_level, state_bytes
from fxgraft.runtime.dsla_serve import DslaServe, Rules
from fxgraft.runtime.engine import Engine, EngineOptions

HERE = Path(__file__).parent
PARTS = ("copy", "steps", "fold", "crunch")
Figures = dict[str, Any]
# Prompt tokens (arXiv 2506.09316, section 4.1): least, most, share of the requests.
MIX = ((128, 2048, 0.6468), (2048, 4096, 0.1616), (4096, 8192, 0.1603), (8192, 20_000, 0.0313))
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
BATCHES, CONTEXTS = (1, 4, 16), (2048, 4096, 16_384, 32_768)
TARGETS = {(1, 16_384): 1.4, (1, 32_768): 1.9, (16, 4096): 2.3}
"""Speed-up of all layers over none by batch and context."""
FOLD = {"requests": 4, "tokens": 16_384, "layers": 16}
FOLD_MS, CRUNCH = 8.5, 2.3


def main() -> None:
    """Run the parts; the result file grows with each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--part", choices=PARTS, help="run one here and print its figures")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if options.part:
        print(json.dumps(RUN[options.part](options.smoke)))
        return
    found: dict[str, Figures] = {}
    for part in options.parts:
        if options.smoke and part == "copy":
            continue
        command = [sys.executable, __file__, "--part", part]
        command += ["--smoke"] if options.smoke else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[part] = json.loads(done.stdout.splitlines()[-1])
        print(f"{part}: {json.dumps(found[part])}", flush=True)
        if not options.smoke:
            write(found, options.out)


def program_of(smoke: bool) -> fxgraft.Program:
    """A Llama whose layers can all be linear."""
    if smoke:
        torch.manual_seed(0)
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=256,
        )  # fmt: skip
        program = fxgraft.capture(LlamaForCausalLM(config))
    else:
        program = fxgraft.capture(engine_gpu.llama())
    pipeline = fxgraft.Pipeline.parse(["optimize", Dsla(fraction=1.0, live=True)])
    return pipeline.run(program, check=False)


def compiled_of(program: fxgraft.Program, smoke: bool) -> fxgraft.Compiled:
    """Lowered for this machine."""
    return fxgraft.compile(program, backend="torch" if smoke else "triton", check=False)


def copy(smoke: bool) -> Figures:
    """Bandwidth of a copy on the device."""
    return engine_gpu.device_copy()


def steps(smoke: bool) -> Figures:
    """Milliseconds of a decode step by level, batch and context, and the bytes that it moves."""
    live = program_of(smoke)
    count = sum(spec.name.startswith("dsla_layer_") for spec in live.inputs)
    rows: list[Figures] = []
    for share in LEVELS:
        program = at_level(live, int(share * count))
        compiled = compiled_of(program, smoke)
        weights = sum(t.numel() * t.element_size() for _, t in program.weights())
        states = 2 * state_bytes(program)
        for context in CONTEXTS if not smoke else (32,):
            engine = Engine(compiled, EngineOptions(
                max_batch=16 if not smoke else 2, max_context=context + 128, snapshots=0,
                memory_bytes=2**22 if smoke else None,
            ))  # fmt: skip
            groups = engine.model.paged.groups
            each = sum(len(g.layers) * g.block_bytes for g in groups) / engine.options.block_size
            for batch in BATCHES if not smoke else (2,):
                if any(batch * -(-(context + 64) // 16) * len(g.layers) > m.total
                       for g, m in zip(groups, engine.memory.groups, strict=True)):  # fmt: skip
                    continue
                ms = _replayed(engine, batch, context, smoke)
                moved = weights + batch * (states + context * each)
                rows.append({"level": share, "batch": batch, "context": context, "ms": ms,
                             "bytes": moved})  # fmt: skip
                print(rows[-1], file=sys.stderr, flush=True)
            engine.close()
            del engine
            torch.cuda.empty_cache() if not smoke else None
    return {"rows": rows}


def _replayed(engine: Engine, batch: int, context: int, smoke: bool) -> float:
    if not smoke:
        return engine_gpu.replayed_ms(engine, batch, context)
    engine.batch.prepare(batch)
    return 0.0


def fold(smoke: bool) -> Figures:
    """Folding many layers of long requests at once, inside a running engine."""
    program = program_of(smoke)
    size = {"requests": 2, "tokens": 48, "layers": 2} if smoke else FOLD
    compiled = compiled_of(program, smoke)
    context = size["tokens"] + 256 if not smoke else 128
    policy = _Burst(program, context, size["layers"])
    engine = Engine(compiled, EngineOptions(
        max_batch=size["requests"], max_context=context, prefix_reuse=False, chunk_tokens=4096,
        memory_bytes=2**22 if smoke else None,
    ), policy=policy)  # fmt: skip
    engine.warm_up()
    sampling = SamplingOptions(max_new_tokens=48, eos_token_id=())
    vocabulary = 128 if smoke else 32000
    for row in range(size["requests"]):
        tokens = [3 + t % (vocabulary - 3) for t in range(row, row + size["tokens"])]
        engine.submit(tokens, sampling)
    gaps: list[tuple[float, bool]] = []
    allocations = 0
    while True:
        converts = policy.now = engine.batch.count == size["requests"] and len(gaps) in (8, 16)
        before = _segments(smoke)
        started = time.perf_counter()
        full = engine.batch.count == size["requests"]
        if not engine.step():
            break
        if not smoke:
            torch.cuda.synchronize()
        if full:
            gaps.append((time.perf_counter() - started, converts))
            # The first conversion fills the allocator's cache.
            allocations = _segments(smoke) - before if converts else allocations
    normal = statistics.median(seconds for seconds, converts in gaps if not converts)
    burst = [seconds for seconds, converts in gaps if converts][-1]
    return {
        "fold_ms": (burst - normal) * 1e3, "step_ms": normal * 1e3, "gap_in_steps": burst / normal,
        "allocations": allocations, "folds": policy.gauges()["dsla_conversions"],
    }  # fmt: skip


def _segments(smoke: bool) -> int:
    """How often the caching allocator asked the device for memory."""
    return 0 if smoke else int(torch.cuda.memory_stats()["num_device_alloc"])


class _Burst(DslaServe):
    """Converts so many layers of every request at once, twice: half of the layers each time."""

    def __init__(self, program: fxgraft.Program, context: int, layers: int) -> None:
        super().__init__(program, Rules(), context)
        self.now, self._half, self._done = False, layers, 0

    def start(self, view: Any, request: Any) -> dict[str, int]:
        return {}

    def decide(self, view: Any) -> list[Any]:
        from fxgraft.runtime.engine import Change

        super().decide(view)
        if not self.now:
            return []
        names = list(view.options)[self._done : self._done + self._half]
        self._done += self._half
        return [Change(request.id, name, 1) for request in view.running for name in names]


def crunch(smoke: bool) -> Figures:
    """Latency with the policy and without, by rate of arrival."""
    program = program_of(smoke)
    compiled = compiled_of(program, smoke)
    context = 128 if smoke else 20_480
    arrivals = _arrivals(12 if smoke else 160, smoke)
    found: list[Figures] = []
    for rate in (50.0,) if smoke else (1.0, 4.0, 6.0):
        for name in ("softmax", "policy"):
            policy = DslaServe(program, Rules(), context) if name == "policy" else None
            engine = Engine(compiled, EngineOptions(
                max_batch=4 if smoke else 64, max_context=context, chunk_tokens=2048,
                memory_bytes=2**20 if smoke else None, snapshots=0, prefix_reuse=False,
            ), policy=policy)  # fmt: skip
            engine.warm_up()
            latency = _engine_load.serve(
                _engine_load.at_rate(arrivals, rate), engine, 128 if smoke else 32000,
                say=lambda text: print(text, file=sys.stderr, flush=True),
            )  # fmt: skip
            tokens = np.array([one.output for one in arrivals])
            stats = engine.stats()
            found.append({
                "rate": rate, "policy": name, "preemptions": stats.preemptions,
                "ms_per_token": float(np.mean(latency.e2e / tokens)) * 1e3,
                "step_ms_per_token": latency.figures()["mean TPOT"] * 1e3, **stats.policy,
            })  # fmt: skip
            print(found[-1], file=sys.stderr, flush=True)
            engine.close()
            del engine
            torch.cuda.empty_cache() if not smoke else None
    return {"rows": found}


def _arrivals(count: int, smoke: bool) -> list[Arrival]:
    """Requests of the paper's mix of prompt lengths, one per second."""
    random = np.random.default_rng(0)
    found: list[Arrival] = []
    seconds = np.cumsum(random.exponential(1.0, count))
    kinds = random.choice(len(MIX), count, p=np.array([m[2] for m in MIX]) / sum(m[2] for m in MIX))
    for second, kind in zip(seconds, kinds, strict=True):
        low, high, _ = MIX[int(kind)]
        prompt = int(random.integers(low, high))
        output = int(random.integers(64, 384))
        sizes = (prompt % 64 + 1, output % 16 + 2) if smoke else (prompt, output)
        found.append(Arrival(float(second), *sizes))
    return found


def write(found: dict[str, Figures], folder: Path) -> None:
    """Write the result file from the parts that are there."""
    rows: list[results.Row] = []
    bandwidth = found.get("copy", {}).get("bandwidth", 0.0)
    measured = found.get("steps", {}).get("rows", [])
    softmax = {(r["batch"], r["context"]): r["ms"] for r in measured if r["level"] == 0}
    for row in measured:
        key = (row["batch"], row["context"])
        bound = row["bytes"] / bandwidth * 1e3 if bandwidth else 0.0
        name = f"step, {row['level']:.0%} linear, batch {key[0]}, {key[1]} tokens"
        rows.append(results.row(
            name, row["ms"], "ms", target=1.15 * bound if bound else None,
            bound=("bytes at copy bandwidth", bound) if bound else None,
        ))  # fmt: skip
        if row["level"] == 1 and key in softmax:
            rows.append(results.row(
                f"speed-up of {name}", softmax[key] / row["ms"], "", better="higher",
                target=TARGETS.get(key),
            ))  # fmt: skip
    if "fold" in found:
        one = found["fold"]
        rows.append(results.row("folding 4 x 16 K tokens x 16 layers", one["fold_ms"], "ms",
                                target=FOLD_MS))  # fmt: skip
        rows.append(results.row("largest gap, in steps", one["gap_in_steps"], "", target=2.0))
        rows.append(results.row("device allocations while folding", one["allocations"], "",
                                target=0.0))  # fmt: skip
    by_rate = {(r["rate"], r["policy"]): r for r in found.get("crunch", {}).get("rows", [])}
    fastest = max((rate for rate, _ in by_rate), default=0.0)
    for rate in sorted({rate for rate, _ in by_rate}):
        plain, policy = by_rate[rate, "softmax"], by_rate[rate, "policy"]
        rows.append(results.row(
            f"latency per token at {rate:g}/s with the policy", policy["ms_per_token"], "ms",
            peer=("without", plain["ms_per_token"]),
        ))  # fmt: skip
        rows.append(results.row(
            f"latency without over with the policy at {rate:g}/s",
            plain["ms_per_token"] / policy["ms_per_token"], "", better="higher",
            target=CRUNCH if rate == fastest else None,
        ))  # fmt: skip
    notes = [__doc__.split("\n\n")[2] if __doc__ else ""]
    results.write("dsla_serve_gpu", "dsla", rows, folder, notes=notes)


RUN = {"copy": copy, "steps": steps, "fold": fold, "crunch": crunch}

if __name__ == "__main__":
    main()
