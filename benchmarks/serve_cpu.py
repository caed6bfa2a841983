"""SmolLM2-135M over HTTP on the CPU: 8 streams at once against 8 one after the other.

Eight prompts of about 50 tokens, 64 new tokens each, greedy, fp32, no prefix reuse; each server in
a process of its own, one after the other. The peer is ``transformers serve``, plain and with
continuous batching, asked by the same client. While streams run, ``/health`` is asked every 20 ms.

    python benchmarks/serve_cpu.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from fxgraft import results, sources
from fxgraft.frontends import sources as loading

# Scripts run without their own folder on the path (PYTHONSAFEPATH).
sys.path.insert(0, str(Path(__file__).parent))
from _http_load import Load, free_port, load, server

SUBJECTS = (
    "the river", "the old harbour", "a mountain railway", "the northern lights",
    "the public library", "a small bakery", "the botanical garden", "the first telescope",
)  # fmt: skip
OURS, PLAIN, BATCHING = "fxgraft serve", "transformers serve", "transformers serve, batching"
PIPELINE = """\
model: smollm2-135m
passes: [optimize]
backend: torch
serve: {max_batch: 8, prefix_reuse: false}
"""


@dataclass
class Measured:
    """One server: its loads, repeated, and the seconds until it was ready."""

    sequential: list[Load]
    at_once: list[Load]
    ready: float

    def rate(self, *, at_once: bool) -> float:
        """Median tokens per second."""
        loads = self.at_once if at_once else self.sequential
        return statistics.median(one.rate for one in loads)

    @property
    def health(self) -> list[float]:
        """Seconds of all answers of ``/health`` while 8 streams ran, ordered."""
        return sorted(seconds for one in self.at_once for seconds in one.health)

    @property
    def p99(self) -> float:
        """Their 99th percentile, in milliseconds."""
        return self.health[int(len(self.health) * 0.99)] * 1e3

    @property
    def texts(self) -> list[list[str]]:
        """The answers of each load."""
        return [[s.text for s in one.streams] for one in (*self.sequential, *self.at_once)]


def main() -> None:
    """Measure the servers one after the other and write the result file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--only-ours", action="store_true", help="write nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline, model = folder / "pipeline.yaml", folder / "model"
        pipeline.write_text(PIPELINE)
        if not options.only_ours:
            write_model(model)
        ours = [sys.executable, "-m", "fxgraft.cli.main", "serve", str(pipeline)]
        commands = {
            OURS: (ours, sources.SMOLLM2),
            PLAIN: (transformers_serve(model), str(model)),
            BATCHING: ([*transformers_serve(model), "--continuous-batching"], str(model)),
        }  # fmt: skip
        found: dict[str, Measured] = {}
        for name, (command, served) in commands.items():
            if name == OURS or not options.only_ours:
                log = folder / "log"
                found[name] = measure(command, served, log, options.repeats, options.new_tokens)
                report(name, found[name])
    if not options.only_ours:
        write(found, options.new_tokens, options.out)


def prompts() -> list[str]:
    """Eight texts of about 50 tokens that differ from the first word on."""
    return [
        f"{subject.capitalize()} has a long history. People who live nearby tell many stories "
        f"about it, and most of them are true. In this chapter we describe how {subject} changed "
        "over the last two hundred years, who took care of it, and why visitors still come."
        for subject in SUBJECTS
    ]  # fmt: skip


def transformers_serve(model: Path) -> list[str]:
    """The peer's command, without its port."""
    command = Path(sys.executable).with_name("transformers")
    return [str(command), "serve", str(model), "--device", "cpu"]


def write_model(folder: Path) -> None:
    """The embedded model as a folder of float32 weights, which the peer can read offline."""
    packed = cast(Any, loading.load(sources.SMOLLM2).model)
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(packed)(config).float()
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    model.save_pretrained(folder)
    sources.tokenizer(sources.SMOLLM2).save_pretrained(folder)


def measure(command: list[str], model: str, log: Path, repeats: int, new_tokens: int) -> Measured:
    """Load one server; what comes first warms it up and does not count."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    texts = prompts()
    with server([*command, "--port", str(port)], address, log) as ready:
        load(address, model, texts[:1], 8, at_once=False)
        load(address, model, texts, 8, at_once=True)
        found = Measured([], [], ready)
        for _ in range(repeats):
            found.sequential.append(load(address, model, texts, new_tokens, at_once=False))
            found.at_once.append(load(address, model, texts, new_tokens, at_once=True))
    return found


def report(name: str, found: Measured) -> None:
    """Print one server's figures."""
    one, eight = found.rate(at_once=False), found.rate(at_once=True)
    print(f"{name:30} ready after {found.ready:5.1f} s; {one:6.1f} and {eight:6.1f} tokens/s "
          f"({eight / one:.2f} times); /health p99 {found.p99:.1f} ms of {len(found.health)}; "
          f"{sum(s.tokens for s in found.at_once[0].streams)} tokens", flush=True)  # fmt: skip


def read_bandwidth() -> float:
    """Bytes per second of summing a tensor that fits no cache, best of ten."""
    data, best = torch.ones(128 * 2**20), float("inf")
    for _ in range(10):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * 4 / best


def write(found: dict[str, Measured], new_tokens: int, folder: Path) -> None:
    """Compare the answers and write the figures."""
    ours, plain, batching = (found[name] for name in (OURS, PLAIN, BATCHING))
    reference = ours.texts[0]
    alike = sum(all(texts[i] == reference[i] for texts in ours.texts) for i in range(8))
    as_peer = sum(a == b for a, b in zip(reference, plain.texts[0], strict=True))
    weights = sum(
        p.numel() * 4 for p in cast(Any, loading.load(sources.SMOLLM2).model).parameters()
    )
    bandwidth = read_bandwidth()
    reading = f"reading the weights once a step at {bandwidth / 1e9:.0f} GB/s"
    best = max((plain, batching), key=lambda one: one.rate(at_once=True))
    peer = PLAIN if best is plain else BATCHING
    one, eight = ours.rate(at_once=False), ours.rate(at_once=True)
    first = statistics.median(s.first for load in ours.at_once for s in load.streams)
    peer_first = statistics.median(s.first for load in best.at_once for s in load.streams)
    rows = [
        results.row("prompts answered alike alone and with 7 others, in every run", alike, "of 8",
                    target=8, better="higher"),
        results.row(f"first answers equal to those of {PLAIN}", as_peer, "of 8", target=8,
                    better="higher"),
        results.row("8 requests one after the other", one, "tokens/s", better="higher",
                    peer=(PLAIN, plain.rate(at_once=False)), bound=(reading, bandwidth / weights)),
        results.row("8 streams at once", eight, "tokens/s", better="higher",
                    peer=(peer, best.rate(at_once=True)),
                    bound=(reading, 8 * bandwidth / weights)),
        results.row("8 streams at once over one after the other", eight / one, "times", target=3.0,
                    better="higher",
                    peer=(BATCHING, batching.rate(at_once=True) / batching.rate(at_once=False))),
        results.row("p99 of /health with 8 streams", ours.p99, "ms", target=100.0,
                    peer=(peer, best.p99)),
        results.row("median time to first token, 8 streams at once", first, "s",
                    peer=(peer, peer_first)),
        results.row("from the command to a healthy server", ours.ready, "s",
                    peer=(PLAIN, plain.ready)),
    ]  # fmt: skip
    notes = [
        f"{new_tokens} new tokens per prompt, {len(ours.at_once)} runs, medians; client and server "
        f"share the processors; {len(ours.health)} answers of /health.",
        f"Streams at once, {PLAIN}: {plain.rate(at_once=True):.1f} tokens/s; {BATCHING}: "
        f"{batching.rate(at_once=True):.1f} tokens/s.",
    ]
    results.write("serve_cpu", "engine", rows, folder, notes=notes)


if __name__ == "__main__":
    main()
