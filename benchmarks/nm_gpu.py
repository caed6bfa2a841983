"""N:M sparse linear layers on one GPU, against cuBLAS and cuSPARSELt, and a whole model's decode.

bfloat16, calls captured in CUDA graphs, on weights that together exceed the L2 cache. The floor is
the time to move the bytes of a call (packed weights, inputs, outputs) at the bandwidth of a device
copy, measured in the same run. The model is the shape of Llama-2-7B with random weights, all its
layers' projections sparse, on our own engine, next to the same model dense.

    python benchmarks/nm_gpu.py
    python benchmarks/nm_gpu.py --tune          # choose configurations, into the user's table
    python benchmarks/nm_gpu.py --tune --ship   # and into the package's
    python benchmarks/nm_gpu.py --part kernels  # or many, model
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import _kernels_nm as nm
import torch
from engine_gpu import llama, replayed_ms
from kernels_gpu import check, copy_bandwidth, microseconds

from fxgraft import results
from fxgraft.kernels.nm_linear.config import TABLE

FLOOR_SHARE, DENSE_SHARE = 0.80, 0.97
# Times over cuBLAS for one row, and over our dense engine for a whole model.
GAINS = {(2, 4): 1.4, (4, 8): 1.3, (2, 8): 2.5}
MODEL_GAINS = {(4, 8): 1.3, (2, 8): 2.0}
CONTEXT = 512
_TUNED_ROWS = (1, 2, 4, 8)


def main() -> None:
    """Measure and write the result file, or tune."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--ship", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--part", choices=("kernels", "many", "model"), action="append")
    chosen = parser.parse_args()
    if chosen.tune:
        for line in nm.tune(nm.SHAPES, _TUNED_ROWS):
            print(line, flush=True)
        print(f"written to {TABLE.path}")
        if chosen.ship:
            nm.ship()
            print(f"and to {TABLE.shipped}")
        return
    bandwidth = copy_bandwidth()
    rows = [results.row("device copy", bandwidth / 1e12, "TB/s", better="higher")]
    parts = {"kernels": few_rows, "many": many_rows, "model": model_rows}
    for name, part in parts.items():
        if not chosen.part or name in chosen.part:
            rows += part(bandwidth)
            results.write("nm_gpu", "flow", rows, chosen.out)


def few_rows(bandwidth: float) -> Iterator[results.Row]:
    """Layers of 1 to 8 rows: times, and for one row the gain over cuBLAS."""
    nm.prepare(nm.chosen(nm.FEW_ROWS))
    for inner, features in nm.SHAPES:
        dense = {count: nm.dense_seconds(inner, features, count) for count in nm.FEW_ROWS}
        for pattern in nm.PATTERNS:
            layer = nm.Layer.make(inner, features, pattern)
            shape = f"{pattern[0]}:{pattern[1]}, K×N {inner}×{features}"
            for count in nm.FEW_ROWS:
                name = f"{shape}, {count} rows"
                check(name, layer.error(layer.ours, count))
                ours, floor = layer.seconds(layer.ours, count), layer.bytes(count) / bandwidth
                print(f"{name}: {ours * 1e6:.1f} µs, {floor / ours:.0%} of floor, "
                      f"{dense[count] / ours:.2f}× cuBLAS", flush=True)  # fmt: skip
                yield microseconds(name, ours, floor, ("cuBLAS", dense[count]), floor / FLOOR_SHARE)
                if count == 1:
                    yield results.row(
                        f"{shape}, 1 row: against cuBLAS", dense[1] / ours, "times",
                        better="higher", target=GAINS.get(pattern),
                    )  # fmt: skip
            del layer
            torch.cuda.empty_cache()


def many_rows(bandwidth: float) -> Iterator[results.Row]:
    """Layers of many rows, never to be slower than dense; 2:4 also through cuSPARSELt."""
    nm.prepare(nm.chosen(nm.MANY_ROWS))
    for (inner, features), pattern in product(((4096, 12288), (14336, 4096)), nm.PATTERNS):
        layer = nm.Layer.make(inner, features, pattern)
        for count in nm.MANY_ROWS:
            name = f"{pattern[0]}:{pattern[1]}, K×N {inner}×{features}, {count} rows"
            check(name, layer.error(layer.ours, count))
            ours, dense = layer.seconds(layer.ours, count), nm.dense_seconds(inner, features, count)
            sparse = nm.sparse_seconds(layer, count)
            print(f"{name}: {ours * 1e6:.1f} µs, cuBLAS {dense * 1e6:.1f}, "
                  f"cuSPARSELt {sparse and sparse * 1e6}", flush=True)  # fmt: skip
            floor = layer.bytes(count) / bandwidth
            yield microseconds(name, ours, floor, ("cuBLAS", dense), dense / DENSE_SHARE)
            if sparse is not None:
                yield results.row(
                    f"{name}: cuSPARSELt against cuBLAS", dense / sparse, "times", better="higher"
                )
        del layer
        torch.cuda.empty_cache()


def sparse_llama(pattern: tuple[int, int] | None) -> Any:
    """The model as a Program, its layers' projections packed with random masks, if any."""
    import fxgraft
    from fxgraft.packed_weights import pack_weights

    program = fxgraft.capture(llama())
    if pattern is None:
        return program
    names = {name: pattern for name, _ in program.weights() if "_proj.weight" in name}
    for name in names:
        weight = program.weight(name).detach()
        mask = nm.random_mask(weight.shape[0], weight.shape[1], *pattern)
        program.set_weight(name, torch.nn.Parameter(weight * mask, requires_grad=False))
    left = pack_weights(program, names)
    assert not left, f"not packed: {left}"
    return program


def decode(pattern: tuple[int, int] | None) -> tuple[float, int]:
    """Milliseconds of a captured decode step of one stream, and bytes of the saved Program."""
    import fxgraft
    from fxgraft.runtime.engine import Engine, EngineOptions

    program = sparse_llama(pattern)
    with tempfile.TemporaryDirectory() as folder:
        program.save(Path(folder) / "program")
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    compiled = fxgraft.compile(program, ["optimize"], backend="triton", check=False)
    del program
    engine = Engine(compiled, EngineOptions(max_batch=1, max_context=CONTEXT + 256, snapshots=0))
    milliseconds = replayed_ms(engine, 1, CONTEXT)
    engine.close()
    return milliseconds, size


def model_rows(bandwidth: float) -> Iterator[results.Row]:
    """A decode step of the whole model, and its file, against ours dense."""
    dense, dense_bytes = decode(None)
    yield results.row(f"Llama-2-7B shape dense, context {CONTEXT}: step", dense, "ms")
    for pattern, gain in MODEL_GAINS.items():
        torch.cuda.empty_cache()
        step, size = decode(pattern)
        name = f"Llama-2-7B shape {pattern[0]}:{pattern[1]}"
        print(f"{name}: {step:.2f} ms, dense {dense:.2f} ms, file {size / dense_bytes:.3f}")
        bound = ("file read once", size / bandwidth * 1e3)
        yield results.row(
            f"{name}, context {CONTEXT}: step", step, "ms", target=dense / gain,
            peer=("our dense engine", dense), bound=bound,
        )  # fmt: skip
        yield results.row(f"{name}: file against dense", size / dense_bytes, "times")


if __name__ == "__main__":
    main()
