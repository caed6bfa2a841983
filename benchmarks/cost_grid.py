"""Costs of whole models: how fast they are evaluated, and whether they equal torch's own counter.

A Llama of 32 layers (8 billion parameters, on the meta device) is costed at 1,000 pairs of batch
and length; every model family of ``coverage.py`` is costed, its matrix products are held against
``torch.utils.flop_counter`` on the original model, and operators without a rule are listed. Torch
does not count grouped products of experts, and masks a window only after it has multiplied, so
families with experts, windows or recurrences are counted apart.

    python benchmarks/cost_grid.py [--only NAME ...]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import fxgraft
from fxgraft import results
from fxgraft.cost import CostTable
from fxgraft.roofline import roofline_table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
POINTS, REPEATS, LIMIT_SECONDS = 1000, 5, 200
PRODUCTS = ("linear", "mm", "matmul", "conv", "attention", "einsum", "bilinear")
OTHER_MIXERS = (
    "grouped_mm", "causal_conv1d", "selective_scan", "ssd", "gated_delta_rule", "mlstm", "wkv",
    "linear_recurrence",
)  # fmt: skip


def main() -> None:
    """Run everything, or some families."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=None, help="families to cost; writes no files")
    options = parser.parse_args()
    rows = [] if options.only else speed()
    found = families(options.only)
    plain = [f for f in found if f["torch"] is not None and f["comparable"]]
    equal = sum(f["ours"] == f["torch"] for f in plain)
    unknown = sorted({op for f in found for op in f["unknown"]})
    print(f"{equal} of {len(plain)} comparable families equal; without a rule: {unknown}")
    if options.only is not None:
        return
    rows += [
        results.row("captured families whose every operator has a cost",
                    sum(not f["unknown"] for f in found), f"of {len(found)}", target=len(found),
                    better="higher"),
        results.row("families without experts, windows and recurrences whose products equal "
                    "torch's counter", equal, f"of {len(plain)}", better="higher"),
    ]  # fmt: skip
    different = [f"{f['name']} {f['ours'] / f['torch']:.3f}" for f in plain
                 if f["ours"] != f["torch"]]  # fmt: skip
    notes = [f"others (ours / torch's): {', '.join(different)}"] if different else []
    results.write("cost_grid", "spine", rows, HERE / "results", notes=notes)


def speed() -> list[results.Row]:
    """Time of costing a 32-layer model, on one core."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
            )
        )  # fmt: skip
    program = fxgraft.capture(model)
    batch, length = np.arange(1, POINTS + 1), np.arange(1, POINTS + 1) * 8
    whole: list[float] = []
    again: list[float] = []
    nodes: list[float] = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        table = program.cost()
        table.evaluate(batch=batch, sequence=length)
        whole.append(time.perf_counter() - start)
        again.append(timed(lambda table=table: table.evaluate(batch=batch, sequence=length)))
        timed(lambda table=table: table.evaluate_rows(batch=batch, sequence=length))
        nodes.append(timed(lambda table=table: table.evaluate_rows(batch=batch, sequence=length)))
    start = time.perf_counter()
    roofline_table(program, "h100-sxm", "bfloat16")
    made = time.perf_counter() - start
    metric = f"cost of a 32-layer Program at {POINTS:,} points"
    return [
        results.row(f"{metric}, expressions made and evaluated", statistics.median(whole), "s",
                    target=1.0),
        results.row(f"{metric}, evaluated again", statistics.median(again), "s"),
        results.row(f"{metric}, every node, evaluated again", statistics.median(nodes), "s"),
        results.row("roofline table of a 32-layer Program", made, "s"),
    ]  # fmt: skip


def timed(call: Any) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def families(only: list[str] | None) -> list[dict[str, Any]]:
    """The families that are captured, costed."""
    import coverage

    found: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=12) as pool:
        for outcome in pool.imap_unordered(cost_family, only or coverage.all_names()):
            if outcome is not None:
                found.append(outcome)
                print(outcome, flush=True)
    return sorted(found, key=lambda outcome: outcome["name"])


def cost_family(name: str) -> dict[str, Any] | None:
    """One family's counts; None if it is not captured."""
    import coverage

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cast(Any, coverage)._quiet()
    try:
        with coverage.time_limit(LIMIT_SECONDS):
            model, program, values, options = build(name)
    except Exception:
        return None
    sizes = program.sizes(values)
    table = program.cost(**sizes)
    comparable = not any(mixer in row.op for row in table.rows for mixer in OTHER_MIXERS)
    comparable = comparable and not windowed(program)
    outcome: dict[str, Any] = {
        "name": name, "unknown": table.unknown, "ours": products_only(table),
        "torch": None, "comparable": comparable,
    }  # fmt: skip
    if isinstance(outcome["ours"], int):
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**values, **options)
        outcome["torch"] = counter.get_total_flops()
    return outcome


def build(name: str) -> tuple[Any, fxgraft.Program, dict[str, torch.Tensor], dict[str, Any]]:
    """A family's model, its Program, inputs at batch 3, and arguments for the model."""
    import _families
    import _other_models
    import coverage

    if name in _other_models.MODELS:
        case = _other_models.MODELS[name]()
        program = fxgraft.capture(case.model, case.inputs(2, 12), dynamic=case.dynamic)
        return case.model, program, dict(case.inputs(3, 13)), case.options
    model = _families.tiny_model(name)
    program = fxgraft.capture(model)
    return model, program, coverage.example(program, 3, 13), {"use_cache": False}


def windowed(program: fxgraft.Program) -> bool:
    """Whether some attention looks at a bounded number of keys."""
    from fxgraft.kernels.spec import argument, spec_of

    return any(
        argument(node, "window") is not None
        for node in program.graph.nodes
        if (spec := spec_of(node)) and spec.name == "attention"
    )


def products_only(table: CostTable) -> int | None:
    """Operations of products, None where a size depends on data."""
    costs = [c.flops for op, c in table.by_op().items() if any(part in op for part in PRODUCTS)]
    total = cast(Any, sum(costs))
    return int(total) if getattr(total, "is_number", True) else None


if __name__ == "__main__":
    main()
