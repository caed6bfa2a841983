"""FlexCiM: golden numbers, headlines, and the default model on macros.

Golden numbers and headlines are those of the published description as far as it is public; the
model is SmolLM2-135M with the linear layers of its perceptrons pruned to 2:8 by magnitude. Plots
go to ``results/flexcim/``.

    python benchmarks/flexcim.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import cast

import torch

import fxgraft
from fxgraft import results
from fxgraft.backends.flexcim import FlexcimCompiled, Hardware, patterns, plots
from fxgraft.backends.flexcim.baselines import headlines
from fxgraft.backends.flexcim.macro import Gemm
from fxgraft.backends.flexcim.mapper import map_gemm
from fxgraft.backends.flexcim.sensitivity import sensitivity
from fxgraft.backends.flexcim.sweep import pareto
from fxgraft.sources import SMOLLM2

HERE = Path(__file__).parent
# T, K, O, pattern: cycles, microjoules.
GOLDEN = {
    (1, 576, 1536, "dense"): (166, 1.2524), (1, 576, 1536, "4:8"): (86, 0.8539),
    (1, 576, 1536, "2:8"): (46, 0.4348), (128, 576, 1536, "dense"): (4230, 20.88),
    (128, 576, 1536, "8:8"): (4230, 20.93), (128, 576, 1536, "4:8"): (2118, 13.45),
    (128, 576, 1536, "2:4"): (2118, 12.36), (128, 576, 1536, "8:16"): (2118, 15.57),
    (128, 576, 1536, "2:8"): (1062, 7.73), (128, 576, 1536, "1:4"): (1062, 7.18),
    (128, 1536, 576, "4:8"): (2118, 13.00), (512, 4096, 4096, "dense"): (264198, 1462.1),
    (512, 4096, 4096, "4:8"): (132102, 917.8), (512, 4096, 4096, "2:4"): (132102, 838.9),
    (512, 4096, 4096, "2:8"): (66054, 504.0), (512, 4096, 4096, "1:4"): (66054, 464.6),
}  # fmt: skip
SWEEP = {
    "sub_macros": [2, 4, 8], "rows": [16, 32, 64], "macros": [64, 128, 256, 512],
    "activation_bits": [4, 8],
}  # fmt: skip


def main() -> None:
    """Run everything and write the result file and the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "flexcim")
    options = parser.parse_args()
    torch.set_num_threads(2)
    exact, error = golden()
    latency, energy = headlines(Hardware())
    rows = [
        results.row("golden cycles that are equal", exact, f"of {len(GOLDEN)}",
                    target=len(GOLDEN), better="higher"),
        results.row("largest error of golden energies", 100 * error, "%", target=0.5),
        results.row("gain in latency over fixed 2:4, error against 1.75",
                    100 * abs(latency / 1.75 - 1), "%", target=2.0),
        results.row("gain in energy over fixed 2:4, error against 1.52",
                    100 * abs(energy / 1.52 - 1), "%", target=2.0),
    ]  # fmt: skip
    effects = sensitivity(Hardware())
    for effect in effects:
        print(effect.constant, effect.values, [f"{v:.3f}" for v in effect.latency],
              [f"{v:.3f}" for v in effect.energy])  # fmt: skip
    rows += of_model(options.out)
    if plots.missing() is None:
        plots.tornado(effects, options.out / "sensitivity.png")
    results.write("flexcim", "flexcim", rows, HERE / "results", notes=[
        "a cost model: no hardware was measured; the paper's workload is not public, the "
        "headlines are those of six 2:8 layers and one 2:4 layer",
    ])  # fmt: skip


def golden() -> tuple[int, float]:
    """Equal cycles, and the largest relative error of energies."""
    exact, worst = 0, 0.0
    for (tokens, inner, outputs, pattern), (cycles, energy) in GOLDEN.items():
        mapped = map_gemm(Hardware(), Gemm(inner, outputs, patterns.parse(pattern)), tokens)
        exact += int(mapped.cycles[0] == cycles)
        worst = max(worst, abs(float(mapped.joules[0]) * 1e6 / energy - 1))
    return exact, worst


def of_model(out: Path) -> list[results.Row]:
    """The default model, dense and pruned: step costs, comparison, table, sweep."""
    dense = fxgraft.Pipeline.parse(["optimize"]).run(fxgraft.capture(SMOLLM2), check=False)
    pruned = prune(dense, "mlp", 2, 8)
    start = time.perf_counter()
    compiled = cast(FlexcimCompiled, fxgraft.compile(pruned, backend="flexcim"))
    lowered = time.perf_counter() - start
    start = time.perf_counter()
    decode = compiled.costs(1, 1, 512)
    costed = time.perf_counter() - start
    start = time.perf_counter()
    compiled.table()
    tabled = time.perf_counter() - start
    whole = cast(FlexcimCompiled, fxgraft.compile(dense, backend="flexcim")).costs(1, 1, 512)
    print(decode)
    for result in compiled.compare(new_tokens=512):
        print(f"{result.name:12} {result.cycles:12,.0f} cycles {result.joules * 1e3:8.3f} mJ")
    designs = compiled.sweep(SWEEP, [(1, 1, 512), (1, 512, 0)])
    for design in pareto(designs):
        print(design)
    compiled.export(out)
    if plots.missing() is None:
        plots.designs(designs, out / "designs.png")
    name = "SmolLM2-135M, one token behind 512"
    return [
        results.row(f"{name}, dense", whole.seconds * 1e3, "ms"),
        results.row(f"{name}, perceptrons 2:8", decode.seconds * 1e3, "ms"),
        results.row(f"{name}, dense, energy", whole.joules * 1e3, "mJ"),
        results.row(f"{name}, perceptrons 2:8, energy", decode.joules * 1e3, "mJ"),
        results.row("lowering SmolLM2-135M, patterns found in its weights", lowered, "s"),
        results.row("costs of one step, node by node", costed, "s", target=1.0),
        results.row("step-cost table", tabled, "s"),
    ]


def prune(program: fxgraft.Program, part: str, n: int, m: int) -> fxgraft.Program:
    """Keep the n largest of each m inputs of the linear layers whose weight is named so."""
    pruned = program.copy()
    for name, weight in program.weights():
        if part in name and weight.dim() == 2:
            groups = weight.detach().view(weight.shape[0], -1, m)
            kept = groups.abs().argsort(-1, descending=True).argsort(-1) < n
            pruned.set_weight(name, (groups * kept).flatten(1))
    return pruned


if __name__ == "__main__":
    main()
