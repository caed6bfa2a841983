"""The simulator against measurements: the fit of efficiencies, and the engine's own steps."""

from __future__ import annotations

import math
import sys
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import fxgraft
from fxgraft.backend import Compiled
from fxgraft.cost_table import StepCostTable
from fxgraft.devices import device
from fxgraft.errors import InputError
from fxgraft.generation.options import SamplingOptions
from fxgraft.runtime.engine import Engine, EngineOptions
from fxgraft.runtime.engine.batch import Batch
from fxgraft.runtime.engine.measure import MeasureGrid, measure_table
from fxgraft.runtime.engine.prefill import Prefill
from fxgraft.runtime.hermes.dense import MODELS, Efficiency
from fxgraft.runtime.hermes.fit import (
    PARAMETERS,
    ServingPoint,
    fit_efficiency,
    simulated,
    steady_tpot,
)
from tests import models
from tests.runtime.hermes._systems import llm, request, run

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
TRUE = Efficiency(0.66, 0.85, 0.5, 0.75, 0.5, 0.6, 0.08, 4e-6, 2.5e-3, 0.0, 4e-5)


def point(**changes: Any) -> ServingPoint:
    values: dict[str, Any] = {
        "model": MODELS["llama-3.1-8b"], "device": device("h100-sxm"), "devices": 1,
        "weights": "bfloat16", "state": "bfloat16", "users": 16, "prompt": 1024, "output": 256,
        "ttft": 0.1, "tpot": 0.01, **changes,
    }  # fmt: skip
    return ServingPoint(**values)


def measured_by(one: ServingPoint, efficiency: Efficiency) -> ServingPoint:
    """The point as a server of this efficiency would have it."""
    return replace(one, tpot=steady_tpot(one, one.cost(efficiency)))


def grid(model: str) -> list[ServingPoint]:
    return [
        measured_by(point(model=MODELS[model], devices=devices, users=users, prompt=prompt,
                          output=output), TRUE)
        for devices in (1, 4) for users in (4, 32, 128) for prompt in (1024, 4096)
        for output in (128, 1024)
    ]  # fmt: skip


def test_the_fit_finds_a_server_and_predicts_another_model() -> None:
    fitted = fit_efficiency(grid("llama-3.1-8b"))
    assert fitted.points == 24
    assert fitted.error < 0.02
    for one in grid("qwen3-32b"):
        guess = steady_tpot(one, one.cost(fitted.efficiency))
        assert guess == pytest.approx(one.tpot, rel=0.1)
    for name, bounds in PARAMETERS.items():
        assert bounds.low <= getattr(fitted.efficiency, name) <= bounds.high * 1.000001
    assert fitted.efficiency.linear_memory == pytest.approx(TRUE.linear_memory, rel=0.1)
    assert fitted.efficiency.step_seconds == pytest.approx(TRUE.step_seconds, rel=0.3)


def test_single_outliers_do_not_carry_the_fit_away() -> None:
    points = grid("llama-3.1-8b")
    spoiled = [replace(one, tpot=one.tpot * 4) if i % 12 == 5 else one
               for i, one in enumerate(points)]  # fmt: skip
    fitted = fit_efficiency(spoiled)
    errors = [steady_tpot(one, one.cost(fitted.efficiency)) / one.tpot - 1 for one in points]
    assert np.median(np.abs(errors)) < 0.04


def test_too_few_points_are_refused() -> None:
    with pytest.raises(InputError, match=r"10 points cannot fix 10 parameters"):
        fit_efficiency(grid("llama-3.1-8b")[:10])


@pytest.mark.parametrize("changes", [{"users": 0}, {"tpot": math.nan}, {"prompt": -1}], ids=str)
def test_impossible_points_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"'{next(iter(changes))}' of a serving point"):
        point(**changes)


def test_users_that_do_not_fit_wait() -> None:
    large = point(model=MODELS["llama-3.1-70b"], devices=2, weights="float8", users=64,
                  prompt=1024, output=8192)  # fmt: skip
    # 0.9 · 160 GB less 70.6 GB of weights, 327,680 bytes per token, 9,216 tokens each.
    assert large.running == 24
    assert point().running == 16


@pytest.mark.parametrize(
    "changes",
    [{}, {"users": 1}, {"users": 64, "prompt": 2048}, {"devices": 4, "output": 1024}], ids=str,
)  # fmt: skip
def test_the_closed_form_is_what_the_simulator_does(changes: dict[str, Any]) -> None:
    one = point(**changes)
    ttft, tpot = simulated(one, TRUE)
    assert tpot == pytest.approx(steady_tpot(one, one.cost(TRUE)), rel=0.08)
    alone = one.cost(TRUE).price([(one.prompt, 0)]).seconds
    assert ttft >= alone * (1 - 1e-9)


def benchmark(name: str) -> Any:
    """A benchmark's module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_rows_of_the_table_become_points(tmp_path: Path) -> None:
    points = benchmark("_serving_points")
    columns = ("backend,backend_version,model_path,system,precision,mode,isl,osl,gemm_quant_mode,"
               "batch_size,tp_size,silicon_ttft_ms,silicon_tpot_ms")  # fmt: skip
    rows = (
        "trtllm,1,Qwen/Qwen3-32B,h100_sxm,fp8,agg,1024,128,fp8,8,2,271.5,18.25",
        "vllm,2,meta-llama/Llama-3.1-70B,h200_sxm,,agg,8192,1024,,64,4,100,20",
        "vllm,2,meta-llama/Llama-3.1-70B,h200_sxm,,disagg,8192,1024,,64,4,100,20",
        "vllm,2,deepseek-ai/DeepSeek-R1,h200_sxm,fp8,agg,8192,1024,fp8,64,4,100,20",
        "vllm,2,meta-llama/Llama-3.1-70B,b200_sxm,fp8,agg,8192,1024,fp8,64,4,100,20",
    )
    name, version = points.PACKAGE.split("==")
    archive = tmp_path / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(points.TABLE, "\n".join((columns, *rows)))
    found = list(points.dense_points(points.table(points.wheel(tmp_path))))
    assert [one.group for one in found] == [
        ("trtllm", "1", "qwen3-32b", "h100-sxm", "float8"),
        ("vllm", "2", "llama-3.1-70b", "h200-sxm", "bfloat16"),
    ]
    first = found[0].point
    assert (first.users, first.devices, first.prompt, first.output) == (8, 2, 1024, 128)
    assert (first.tpot, first.ttft, first.state) == (0.01825, 0.2715, "float8")
    assert found[1].point.state == "bfloat16"


OPTIONS = EngineOptions(
    max_batch=3, max_context=64, chunk_tokens=16, memory_bytes=2**20, prefix_reuse=False
)
GRID = MeasureGrid(batch=(1, 3), context=(1, 60), new_tokens=(1, 16), cached=(0, 40))


@cache
def compiled() -> Compiled:
    return fxgraft.compile(models.llama(num_hidden_layers=1), backend="torch")


def test_alternating_steps_are_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six requests at once: the same prompts and the same decodes in the same steps."""
    shapes = [(20, 5), (37, 1), (3, 9), (16, 2), (40, 7), (9, 4)]
    steps: list[tuple[int, int]] = []
    compute, launch = cast(Any, Prefill)._compute, Batch.launch

    def chunk(prefill: Prefill, one: Any, count: int) -> None:
        steps[-1] = steps[-1][0] + count, 0
        compute(prefill, one, count)

    def decode(batch: Batch) -> Any:
        steps[-1] = steps[-1][0], batch.count
        return launch(batch)

    monkeypatch.setattr(Prefill, "_compute", chunk)
    monkeypatch.setattr(Batch, "launch", decode)
    engine = Engine(compiled(), OPTIONS)
    for number, (prompt, output) in enumerate(shapes):
        ids = [3 + (number + i) % 40 for i in range(prompt)]
        engine.submit(ids, SamplingOptions(max_new_tokens=output, eos_token_id=()))
    steps.append((0, 0))
    while engine.step():
        steps.append((0, 0))
    engine.close()
    client = llm(strategy="alternating", max_batched_tokens=16, max_sequences=3)
    rows = run([request(i, 0.0, *shape) for i, shape in enumerate(shapes)], [client]).steps.table()
    counts = zip(rows["prefill_tokens"], rows["decodes"], rows["steps"], strict=True)
    wanted = [(tokens, decodes) for tokens, decodes, number in counts for _ in range(int(number))]
    found = [part for tokens, decodes in steps for part in ((tokens, 0), (0, decodes)) if any(part)]
    assert found == wanted


def test_a_load_is_served_and_simulated(tmp_path: Path) -> None:
    load = benchmark("_engine_load")
    engine = Engine(compiled(), OPTIONS)
    table = measure_table(compiled(), GRID, engine=engine, repeats=2, rounds=1, held_out=0)
    path = table.save(tmp_path / "table.json")
    arrivals = load.at_rate(load.draw(12, (2, 40), (1, 12), seed=0), 400.0)
    predicted = load.simulate(arrivals, path, engine, tmp_path)
    said: list[str] = []
    measured = load.serve(arrivals, engine, engine.facts.vocab_size, say=said.append)
    engine.close()
    assert np.diff([one.second for one in arrivals]).min() > 0
    for latency in (predicted, measured):
        assert (latency.ttft > 0).all()
        assert (latency.e2e >= latency.ttft).all()
        ones = np.array([one.output == 1 for one in arrivals])
        assert (np.isnan(latency.tpot) == ones).all()
        assert set(latency.figures()) == {
            f"{kind} {name}" for kind in ("mean", "p99") for name in ("TTFT", "TPOT", "end to end")
        }


def test_errors_and_speed_ups_become_rows() -> None:
    load, script = benchmark("_engine_load"), benchmark("hermes_engine")

    def latency(scale: float) -> Any:
        times = np.linspace(1.0, 2.0, 50) * scale
        return load.Latency(times, times, times)

    rows = script.compared(latency(1.04), latency(1.0), "x")
    assert [row.value for row in rows] == pytest.approx([4.0] * 6)
    assert [row.met for row in rows] == [True] * 6
    pairs = {"a": (latency(2.0), latency(2.2)), "b": (latency(1.0), latency(1.0))}
    (row,) = script.speed_ups(pairs)
    assert (row.value, row.met) == (pytest.approx(20.0), False)


def test_the_bearable_load_is_that_of_a_full_engine(tmp_path: Path) -> None:
    load, script = benchmark("_engine_load"), benchmark("hermes_engine")
    engine = Engine(compiled(), OPTIONS)
    table = measure_table(compiled(), GRID, engine=engine, repeats=1, rounds=1, held_out=0)
    step = {"name": "step", "per": "step", "axes": {}, "seconds": [0.5], "joules": None}
    steady = StepCostTable.from_json({**table.to_json(), "parts": [step]})
    path = steady.save(tmp_path / "table.json")
    arrivals = load.draw(3, (16, 17), (5, 6), seed=1)
    # Three steps of prompts, of one chunk each and a decode behind the first two, then the rest.
    rate = script.bearable(arrivals, path, engine, tmp_path)
    engine.close()
    assert 3 / rate == pytest.approx(0.5 * (3 + 6))


def test_the_engine_script_on_a_tiny_model(tmp_path: Path) -> None:
    script = benchmark("hermes_engine")
    setting = script.Setting(
        models.llama(num_hidden_layers=1), "tiny", "torch",
        {"none": [], "pruned": [{"prune_heads": {"sparsity": 0.5}}]}, OPTIONS, (2, 20), (2, 6),
        repeats=1,
    )  # fmt: skip
    rows, notes = script.measure(setting, 4, tmp_path)
    loads = [row.metric.split(":")[0] for row in rows[:-1]]
    assert loads == ["tiny, low load"] * 6 + ["tiny, overload"] * 6
    assert rows[-1].metric.startswith("passes [pruned] instead of [none]")
    assert all(math.isfinite(row.value) and row.target for row in rows)
    assert "4 requests, prompts 2 to 19, outputs 2 to 5 tokens" in notes[0]
