"""Measured step-cost tables: the grid, what is timed, what the table says of itself."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import numpy as np
import pytest

import fxgraft
from fxgraft.backend import Compiled
from fxgraft.cost_table import StepCostTable
from fxgraft.errors import InputError, LoweringError
from fxgraft.generation.options import SamplingOptions
from fxgraft.runtime.engine import Engine, EngineOptions
from fxgraft.runtime.engine import measure as measuring
from fxgraft.runtime.engine.measure import MeasureGrid, measure_table
from fxgraft.runtime.engine.stopwatch import Stopwatch
from tests import models

OPTIONS = EngineOptions(max_batch=3, max_context=64, chunk_tokens=16, memory_bytes=2**20)
GRID = MeasureGrid(batch=(1, 3), context=(1, 30), new_tokens=(1, 8), cached=(0, 30))


@cache
def compiled() -> Compiled:
    return fxgraft.compile(models.llama(num_hidden_layers=1), backend="torch")


def is_idle(engine: Engine) -> bool:
    stats = engine.stats()
    busy = stats.queued + stats.prefilling + stats.running
    return busy + stats.blocks_used + stats.slots_used + stats.blocks_cached == 0


def test_a_table_is_measured(tmp_path: Any) -> None:
    table = measure_table(
        compiled(), GRID, options=OPTIONS, repeats=2, rounds=1, held_out=6, seed=3
    )
    assert (table.origin.method, table.identity.device) == ("wall clock", "cpu")
    assert (table.identity.backend, table.identity.seed) == ("torch", 3)
    assert table.origin.points == 8
    assert table.origin.held_out is not None
    assert table.origin.held_out.steps == 6
    assert table.validity.sequences == (1, 4)
    assert [part.per for part in table.parts] == ["step", "prefill", "decode"]
    mixed = table.price([(8, 0)], 3, 60)
    assert 0 < mixed.seconds < 10
    assert mixed.joules is None
    # The simulator finds as many blocks as the engine has.
    memory = table.memory
    block = memory.bytes_per_token * memory.block_tokens
    assert memory.capacity is not None
    blocks = (memory.capacity - memory.weights) / block
    engine = Engine(compiled(), OPTIONS)
    assert blocks == engine.memory.groups[0].total
    engine.close()
    assert StepCostTable.load(table.save(tmp_path / "table.json")) == table


class Clock:
    """Times steps by a formula, so that the fit can be held against it."""

    def __init__(self, engine: Engine, repeats: int, rounds: int) -> None:
        self.engine = engine
        self.longest_context = 40

    def longest_cached(self, new: int) -> int:
        return 60 - new

    def prefill(self, new: int, cached: int) -> float | None:
        return 1.0 + 0.25 * new + 0.001 * new * (cached + new / 2)

    def decode(self, batch: int, context: int) -> float | None:
        return None if batch * context > 100 else 1.0 + 0.1 * batch + 0.01 * batch * context

    def mixed(self, new: int, cached: int, batch: int, context: int) -> float | None:
        alone = self.prefill(new, cached), self.decode(batch, context)
        return None if alone[0] is None or alone[1] is None else alone[0] + alone[1] - 1.0


def test_the_table_gives_back_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "Stopwatch", Clock)
    grid = MeasureGrid((1, 2, 3), (1, 20, 60), (1, 4, 16), (0, 20, 60))
    table = measure_table(compiled(), grid, options=OPTIONS, held_out=30)
    clock = Clock(Engine(compiled(), OPTIONS), 1, 1)
    assert table.origin.launch_seconds == pytest.approx(1.0)
    for new, cached in itertools.product((1, 4, 16), (0, 20, 60)):
        assert table.price([(new, cached)]).seconds == pytest.approx(clock.prefill(new, cached))
    for batch, context in itertools.product((1, 2, 3), (1, 10, 20, 60)):
        wanted = 1.0 + 0.1 * batch + 0.01 * batch * context
        found = table.price((), batch, batch * context).seconds
        assert found == pytest.approx(wanted)
    both = table.price([(4, 20)], 2, 2 * 20).seconds
    assert both == pytest.approx(clock.mixed(4, 20, 2, 20))
    assert table.origin.held_out is not None
    assert table.origin.held_out.maximum < 0.05
    # The clock goes to 40 keys, 100 in all, and to 60 tokens of a prompt with its chunk.
    assert table.origin.points == 18 - 3 - 3
    assert any("are extrapolated" in note for note in table.origin.notes)


@pytest.mark.parametrize("build", [models.llama, models.gemma2, models.jamba])
def test_measuring_leaves_the_engine_as_it_was(build: Any) -> None:
    model = fxgraft.compile(build(), backend="torch")
    engine = Engine(model, OPTIONS)
    options = engine.prefill.options
    watch = Stopwatch(engine, repeats=2, rounds=1)
    assert (watch.prefill(8, 20) or 0) > 0
    assert (watch.decode(3, 20) or 0) > 0
    assert (watch.mixed(8, 0, 2, 9) or 0) > 0
    assert is_idle(engine)
    assert engine.prefill.options is options
    # It still serves, and gives the tokens that it would have given.
    prompt = [5, 9, 11, 3]
    request = engine.submit(prompt, SamplingOptions(max_new_tokens=6))
    while engine.step():
        pass
    fresh = Engine(model, OPTIONS)
    expected = fresh.submit(prompt, SamplingOptions(max_new_tokens=6))
    while fresh.step():
        pass
    assert request.tokens == expected.tokens


def test_the_stopwatch_times_the_step_it_says() -> None:
    engine = Engine(compiled(), OPTIONS)
    watch = Stopwatch(engine, repeats=3, rounds=2)
    seen: list[tuple[int, int, list[int]]] = []
    step = engine.step

    def spy() -> bool:
        before = [r.past for r in engine.batch.requests]
        waiting = [r.past for r in engine.prefill.requests]
        done = step()
        after = [r.past for r in engine.prefill.requests]
        taken = [b - a for a, b in zip(waiting, after, strict=True)]
        seen.append((len(before), sum(taken), [*before, *waiting]))
        return done

    engine.step = spy
    watch.prefill(5, 12)
    assert seen == [(0, 5, [12])] * 8
    seen.clear()
    watch.decode(3, 30)
    steps = seen[:8]
    assert {(rows, taken) for rows, taken, _ in steps} == {(3, 0)}
    # Keys of a step are its past tokens and the new one; 30 on average.
    keys = [pasts[0] + 1 for _, _, pasts in steps]
    assert keys == list(range(keys[0], keys[0] + 8))
    assert abs(np.mean(keys) - 30) <= 1
    seen.clear()
    watch.mixed(4, 0, 2, 20)
    assert {(rows, taken) for rows, taken, _ in seen[:8]} == {(2, 4)}


def test_what_does_not_fit_is_not_measured() -> None:
    options = OPTIONS.model_copy(update={"memory_bytes": 40_000})
    engine = Engine(compiled(), options)
    watch = Stopwatch(engine, repeats=1, rounds=1)
    assert watch.prefill(64, 0) is None
    assert watch.decode(1, 30) is not None
    assert watch.decode(3, 60) is None
    assert is_idle(engine)


def test_the_default_grid_covers_the_engine() -> None:
    grid = MeasureGrid.for_engine(Engine(compiled(), OPTIONS))
    assert grid == MeasureGrid((1, 2, 3), (1, 63), (1, 2, 4, 8, 16), (0, 63))


@pytest.mark.parametrize(
    "axes",
    [
        {"batch": ()}, {"batch": (2, 3)}, {"context": (0, 5)}, {"new_tokens": (1, 4, 4)},
        {"cached": (1, 2)}, {"cached": (0, 9, 5)},
    ],
)  # fmt: skip
def test_impossible_grids(axes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(axes))):
        MeasureGrid(**{**vars(GRID), **axes})


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"batch": (1, 4)}, "'batch' goes up to 4, the engine to 3"),
        ({"context": (1, 65)}, "'context' goes up to 65"),
        ({"new_tokens": (1, 64)}, "'new_tokens' goes up to 64"),
        ({"cached": (0, 64)}, "'cached' goes up to 64"),
    ],
)
def test_grids_beyond_the_engine(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure_table(compiled(), MeasureGrid(**{**vars(GRID), **axes}), options=OPTIONS)


def test_a_busy_engine_is_refused() -> None:
    engine = Engine(compiled(), OPTIONS)
    engine.submit([1, 2], SamplingOptions(max_new_tokens=4))
    with pytest.raises(InputError, match="the engine has requests"):
        measure_table(compiled(), GRID, engine=engine)
    with pytest.raises(InputError, match="0 repeats"):
        measure_table(compiled(), GRID, options=OPTIONS, repeats=0)


def test_a_backend_without_an_engine_is_refused() -> None:
    other = fxgraft.compile(compiled().program, backend="flexcim")
    with pytest.raises(LoweringError, match="runs no paged graphs"):
        measure_table(other, GRID, options=OPTIONS)


def test_errors_are_relative_to_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(Clock):
        calls = 0

        def prefill(self, new: int, cached: int) -> float | None:
            Half.calls += 1
            # After the grid every step takes twice as long.
            return 2.0 if Half.calls <= 4 else 4.0

        def decode(self, batch: int, context: int) -> float | None:
            return self.prefill(0, 0)

        def mixed(self, new: int, cached: int, batch: int, context: int) -> float | None:
            return None

    monkeypatch.setattr(measuring, "Stopwatch", Half)
    grid = MeasureGrid((1,), (1, 30), (1,), (0, 30))
    table = measure_table(compiled(), grid, options=OPTIONS, held_out=8)
    error = table.origin.held_out
    assert error is not None
    assert math.isclose(error.maximum, 0.5)
    assert error.steps == 6
