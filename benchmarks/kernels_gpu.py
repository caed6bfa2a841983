"""Triton kernels of the decode step on one GPU, against cuBLAS and PyTorch's attention.

bfloat16, calls captured in CUDA graphs, on weights and caches that together exceed the L2 cache.
The floor is the time to move the bytes of a call at the bandwidth of a device copy (bytes read and
written), measured in the same run. Attention steps rotate queries and keys and write the cache,
which the peer, on a contiguous cache, does not.

    python benchmarks/kernels_gpu.py
    python benchmarks/kernels_gpu.py --tune     # choose configurations, into the user's table
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import _kernels_attention as attention
import _kernels_linear as linear
import _kernels_small as small
import torch

from fxgraft import results
from fxgraft.kernels.fused_linear.config import TABLE

# Of the copy bandwidth, for one row: K × N.
LINEAR_TARGETS = {(4096, 4096): 0.90, (11008, 4096): 0.90}
LARGER_TARGET, FEW_ROWS_TARGET, ATTENTION_TARGET = 0.96, 0.90, 0.90
# Two measurements of one kernel differ by about this factor.
SPREAD = 1.02
MOST_ERROR = 1e-2


def main() -> None:
    """Measure and write the result file, or tune."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.tune:
        for line in linear.tune((*linear.SHAPES, *linear.MORE_SHAPES)):
            print(line, flush=True)
        print(f"written to {TABLE.path}")
        return
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.3f} TB/s", flush=True)
    rows = [results.row("device copy", bandwidth / 1e12, "TB/s", better="higher")]
    for part in (linear_rows, attention_rows, small_rows):
        rows += part(bandwidth)
        results.write("kernels_gpu", "engine", rows, options.out)


def copy_bandwidth() -> float:
    """Bytes read and written per second by copying 2 GiB."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    times: list[float] = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / median(times)


def linear_rows(bandwidth: float) -> Iterator[results.Row]:
    """Linear layers of 1 to 64 rows."""
    linear.prepare(linear.chosen())
    worst = 0.0
    for inner, features in linear.SHAPES:
        layer = linear.Layer.make(inner, features)
        line = f"linear {inner}x{features:<6}"
        for count in linear.ROWS:
            check(f"linear {inner}×{features}, {count} rows", layer.error(linear.ours, count))
            ours = layer.seconds(linear.ours, count)
            library = layer.seconds(torch.nn.functional.linear, count)
            floor = layer.bytes(count) / bandwidth
            worst = max(worst, ours / library)
            line += f" {count}: {floor / ours:.0%} ({floor / library:.0%})"
            share = LINEAR_TARGETS.get((inner, features), LARGER_TARGET)
            share *= 1 if count == 1 else FEW_ROWS_TARGET
            target = floor / share if count <= 8 else SPREAD * library
            name = f"linear K×N {inner}×{features}, {count} rows"
            yield microseconds(name, ours, floor, ("cuBLAS", library), target)
        print(line, flush=True)
        del layer
        torch.cuda.empty_cache()
    yield results.row("slowest of these against cuBLAS", worst, "times its time", target=SPREAD)


def attention_rows(bandwidth: float) -> Iterator[results.Row]:
    """Decode steps over blocks of 16 tokens, 32 query heads of 128 channels."""
    attention.prepare()
    for batch, context, group in attention.cases():
        step = attention.Step.make(batch, context, group)
        name = f"attention step, batch {batch}, context {context}, {group} query heads per kv head"
        check(name, step.error())
        ours, library = step.seconds("ours"), step.seconds("library")
        floor = step.bytes / bandwidth
        print(
            f"attention group {group} batch {batch:<2} context {context:<6} "
            f"{ours * 1e6:8.1f} us {floor / ours:4.0%} ({floor / library:.0%})", flush=True,
        )  # fmt: skip
        target = floor / ATTENTION_TARGET if context >= 8192 else None
        yield microseconds(name, ours, floor, ("SDPA, contiguous cache", library), target)
        del step
        torch.cuda.empty_cache()


def small_rows(bandwidth: float) -> Iterator[results.Row]:
    """Elementwise kernels and prompts."""
    for case in small.elementwise():
        floor = case.bytes / bandwidth
        print(f"{case.name} {case.ours * 1e6:.1f} us, PyTorch {case.library * 1e6:.1f}", flush=True)
        yield microseconds(case.name, case.ours, floor, ("PyTorch", case.library), None)
    for case in small.prompts():
        rates = [case.flops / seconds / 1e12 for seconds in (case.ours, case.library)]
        print(f"{case.name} {rates[0]:.0f} TFLOP/s, SDPA {rates[1]:.0f}", flush=True)
        yield results.row(
            f"attention, {case.name}", rates[0], "TFLOP/s", better="higher",
            peer=("SDPA, contiguous, unmasked behind a past", rates[1]),
        )  # fmt: skip


def check(name: str, error: float) -> None:
    """No time without a right result.

    Raises:
        AssertionError: the relative error is too large.
    """
    assert error < MOST_ERROR, f"{name}: relative error {error:.1e}"


def microseconds(
    name: str, seconds: float, floor: float, peer: tuple[str, float], target: float | None
) -> results.Row:
    """A row of times, given in seconds."""
    return results.row(
        name,
        seconds * 1e6,
        "µs",
        target=None if target is None else target * 1e6,
        peer=(peer[0], peer[1] * 1e6),
        bound=("floor", floor * 1e6),
    )


if __name__ == "__main__":
    main()
