"""Step-cost tables measured on the engine: real steps on a real device, over a grid.

A step of the engine is one call per chunk of a prompt and one call over all running requests. Both
are timed as whole steps of the loop, host work included, at every point of a grid; state is
allocated but not computed, since its contents do not change the time. What both kinds of steps
have in common is found from steps that do both, and becomes a part of its own.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from fxgraft.backend import Compiled
from fxgraft.cost_table import (
    Energy,
    Growing,
    HeldOut,
    Identity,
    Memory,
    Origin,
    Part,
    StepCostTable,
    Validity,
)
from fxgraft.cost_table_grid import Array
from fxgraft.element_types import ElementTypes
from fxgraft.errors import InputError
from fxgraft.runtime.engine.engine import Engine
from fxgraft.runtime.engine.options import EngineOptions
from fxgraft.runtime.engine.stopwatch import Stopwatch
from fxgraft.step_memory import weight_bytes
from fxgraft.step_tables import identity

_MIXED = 5
_LEAST_SECONDS = 1e-9


@dataclass(frozen=True)
class MeasureGrid:
    """Where steps are measured; each axis increases from 1 on, ``cached`` from 0 on.

    Attributes:
        batch: running requests.
        context: keys that each of them attends to, its new token included.
        new_tokens: of a chunk of a prompt.
        cached: tokens in front of the chunk.
    """

    batch: tuple[int, ...]
    context: tuple[int, ...]
    new_tokens: tuple[int, ...]
    cached: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, first in (("batch", 1), ("context", 1), ("new_tokens", 1), ("cached", 0)):
            knots: tuple[int, ...] = getattr(self, name)
            if not knots or knots[0] != first or any(b <= a for a, b in itertools.pairwise(knots)):
                raise InputError(
                    f"grid axis {name!r} is {knots}", f"give increasing numbers from {first} on"
                )

    @staticmethod
    def for_engine(engine: Engine) -> MeasureGrid:
        """Powers of two up to what the engine can do, and the sizes of its prepared steps."""
        most = engine.options.max_batch
        bucket = engine.batch.bucket
        edges = [n for n in range(1, most) if bucket(n) != bucket(n + 1)]
        edges = edges if len(edges) <= 16 else []
        longest = engine.max_context - 1
        return MeasureGrid(
            tuple(sorted({*_powers(1, most), *edges, *(n + 1 for n in edges)})),
            (1, *_powers(128, longest)) if longest > 1 else (1,),
            _powers(1, min(engine.options.chunk_tokens, longest)),
            (0, *_powers(128, longest)),
        )


def _powers(low: int, high: int) -> tuple[int, ...]:
    """``low`` times powers of two, up to ``high`` and with it."""
    return tuple(sorted({low * 2**n for n in range(32) if low * 2**n < high} | {high}))


def measure_table(
    compiled: Compiled,
    grid: MeasureGrid | None = None,
    *,
    engine: Engine | None = None,
    options: EngineOptions | None = None,
    device: str = "",
    repeats: int = 8,
    rounds: int = 3,
    held_out: int = 24,
    seed: int = 0,
) -> StepCostTable:
    """Measure a step-cost table.

    Args:
        compiled: a causal language model, lowered by a backend that runs paged graphs.
        grid: where to measure; default ``MeasureGrid.for_engine``. Points that are longer than the
            context or do not fit into the engine's memory are extrapolated; the table's notes
            count them.
        engine: an idle engine over ``compiled``; default a new one, closed afterwards.
        options: of a new engine.
        device: name of the device for the table; default torch's name for it.
        repeats: steps that are timed together.
        rounds: times that each point is measured; the median counts.
        held_out: steps at random sizes, a third of them mixed, that the table is checked on.
        seed: of those sizes.

    Returns:
        A table whose parts are one call per prefill, one per decode, and what each step adds.

    Raises:
        InputError: the engine is busy, or the grid leaves its limits.
        LoweringError, StateError: the model cannot be served.
    """
    own = engine is None
    engine = engine or Engine(compiled, options)
    try:
        watch = Stopwatch(engine, repeats, rounds)
        grid = grid or MeasureGrid.for_engine(engine)
        _check(engine, grid)
        engine.warm_up()
        return _measure(compiled, watch, grid, device, held_out, seed)
    finally:
        if own:
            engine.close()


def _check(engine: Engine, grid: MeasureGrid) -> None:
    limits = {
        "batch": engine.options.max_batch,
        "context": engine.max_context,
        "new_tokens": engine.max_context - 1,
        "cached": engine.max_context - 1,
    }
    for name, limit in limits.items():
        last = getattr(grid, name)[-1]
        if last > limit:
            raise InputError(
                f"grid axis {name!r} goes up to {last}, the engine to {limit}",
                "shorten the axis, or raise the engine's options max_batch and max_context",
            )


def _measure(
    compiled: Compiled,
    watch: Stopwatch,
    grid: MeasureGrid,
    device: str,
    held_out: int,
    seed: int,
) -> StepCostTable:
    prefill, decode, missing = _steps(watch, grid)
    common = _common(watch, grid, prefill, decode)
    notes = ["times of whole engine steps, in which requests are greedy"]
    if missing:
        notes.append(
            f"{missing} of {prefill.size + decode.size} points exceed the engine's context or "
            "memory and are extrapolated"
        )
    types = ElementTypes.of(compiled.program)
    measured_on = watch.engine.model.device
    table = StepCostTable(
        identity=_identity(compiled, types, device or device_name(measured_on), seed),
        memory=_memory(compiled, watch.engine, types),
        energy=Energy(),
        origin=Origin(
            method="device events" if measured_on.type == "cuda" else "wall clock",
            points=prefill.size + decode.size - missing,
            launch_seconds=common,
            notes=tuple(notes),
        ),
        validity=Validity(
            tokens=(1, grid.new_tokens[-1] + grid.batch[-1]),
            sequences=(1, grid.batch[-1] + 1),
            new_tokens=(1, grid.new_tokens[-1]),
            context=(0, min(grid.context[-1], grid.cached[-1])),
        ),
        parts=_parts(grid, prefill, decode, common),
    )
    error = _held_out(watch, table, grid, held_out, seed) if held_out else None
    return table.model_copy(update={"origin": table.origin.model_copy(update={"held_out": error})})


def _parts(grid: MeasureGrid, prefill: Array, decode: Array, common: float) -> tuple[Part, ...]:
    def rest(times: Array) -> tuple[float, ...]:
        return tuple(np.maximum(times - common, _LEAST_SECONDS).ravel().tolist())

    # One prefill may run beside a full batch, so the axis goes on by one.
    batch = (*grid.batch, grid.batch[-1] + 1)
    last = decode[-1] if len(decode) == 1 else 2 * decode[-1] - decode[-2]
    wider = np.vstack([decode, np.maximum(last, decode[-1])])
    return (
        Part(name="step", per="step", axes={}, seconds=(common,)),
        Part(
            name="prefill", per="prefill",
            axes={"new_tokens": grid.new_tokens, "context": grid.cached}, seconds=rest(prefill),
        ),
        Part(
            name="decode", per="decode",
            axes={"batch": batch, "context": grid.context}, seconds=rest(wider),
        ),
    )  # fmt: skip


def _steps(watch: Stopwatch, grid: MeasureGrid) -> tuple[Array, Array, int]:
    """Seconds of prefills [new_tokens, cached] and decodes [batch, context]; points left out."""
    prefill, shorter = _over(watch.prefill, watch.longest_cached, grid.new_tokens, grid.cached)
    decode, fewer = _over(watch.decode, lambda _: watch.longest_context, grid.batch, grid.context)
    return prefill, decode, shorter + fewer


def _over(
    measure: Callable[[int, int], float | None],
    longest: Callable[[int], int],
    rows: Sequence[int],
    columns: Sequence[int],
) -> tuple[Array, int]:
    """Times over a grid whose columns are context.

    Where the engine cannot go as far as a column, the longest context that it can is measured, and
    the line through the last two measured ones goes on.

    Returns:
        [rows, columns], and how many of them were extrapolated.
    """
    times = np.zeros((len(rows), len(columns)))
    missing, slope, before = 0, 0.0, 1
    for i, row in enumerate(rows):
        known = _along(partial(measure, row), longest(row), columns)
        if not known:
            raise InputError(
                f"the engine's memory is too little for a step over {row} at {columns[0]} tokens",
                "shorten the grid, or give the engine more memory",
            )
        (last, end), *earlier = reversed(known.items())
        slope = (end - earlier[0][1]) / (last - earlier[0][0]) if earlier else slope * row / before
        slope, before = max(slope, 0.0), row
        missing += sum(column not in known for column in columns)
        times[i] = [known.get(column, end + slope * (column - last)) for column in columns]
    return times, missing


def _along(
    measure: Callable[[int], float | None], longest: int, columns: Sequence[int]
) -> dict[int, float]:
    """Times by context, as far as context and memory allow."""
    known: dict[int, float] = {}
    for column in columns:
        context = min(column, longest)
        if context < 0 or context in known:
            break
        found = measure(context)
        if found is None:
            break
        known[context] = found
    return known


def _common(watch: Stopwatch, grid: MeasureGrid, prefill: Array, decode: Array) -> float:
    """What a step takes besides its calls: both kinds apart, less both together."""
    places = np.linspace(0, len(grid.new_tokens) - 1, _MIXED).round().astype(int)
    excess: list[float] = []
    for number, place in enumerate(places):
        row = round(number * (len(grid.batch) - 1) / max(_MIXED - 1, 1))
        both = watch.mixed(grid.new_tokens[int(place)], 0, grid.batch[row], grid.context[0])
        if both is not None:
            excess.append(float(prefill[place, 0] + decode[row, 0]) - both)
    least = float(min(prefill.min(), decode.min()))
    return min(max(statistics.median(excess), 0.0), least) if excess else 0.0


def _held_out(
    watch: Stopwatch, table: StepCostTable, grid: MeasureGrid, count: int, seed: int
) -> HeldOut | None:
    """Errors at random sizes, drawn evenly on a logarithmic scale."""
    rng = np.random.default_rng(seed)
    highest = table.validity.context[1]

    def draw(high: int) -> int:
        return int(math.exp(rng.uniform(0, math.log(high + 1))))

    errors: list[float] = []
    for number in range(count):
        new, batch = draw(grid.new_tokens[-1]), draw(grid.batch[-1])
        context = min(draw(highest), watch.longest_context)
        kind = number % 3
        if kind == 0:
            context = max(min(context, watch.longest_cached(new)), 0)
            found, price = watch.prefill(new, context), table.price([(new, context)])
        elif kind == 1:
            found, price = watch.decode(batch, context), table.price((), batch, batch * context)
        else:
            batch = min(batch, grid.batch[-1])
            found = watch.mixed(new, 0, batch, context)
            price = table.price([(new, 0)], batch, batch * context)
        if found is not None:
            errors.append(abs(price.seconds - found) / found)
    if not errors:
        return None
    return HeldOut(
        mean=float(np.mean(errors)), p90=float(np.quantile(errors, 0.9)),
        maximum=max(errors), steps=len(errors),
    )  # fmt: skip


def device_name(device: torch.device) -> str:
    """Torch's name for a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _identity(compiled: Compiled, types: ElementTypes, device: str, seed: int) -> Identity:
    found = identity(compiled.program, types, compiled.backend, device)
    return found.model_copy(update={"seed": seed})


def _memory(compiled: Compiled, engine: Engine, types: ElementTypes) -> Memory:
    """As the engine has it: its blocks, slots and weights are all the memory there is."""
    paged = engine.model.paged
    pools = sum(
        group.block_bytes * blocks.total
        for group, blocks in zip(paged.groups, engine.memory.groups, strict=True)
    )
    fixed = sum(pool.item_bytes for pool in paged.slot_pools)
    weights = weight_bytes(compiled.program, types)
    growing = [
        Growing(
            bytes_per_token=group.block_bytes * len(group.layers) // paged.block_size,
            limit=None if group.limit is None else group.limit + 1,
        )
        for group in paged.groups
    ]
    return Memory(
        weights=weights,
        growing=tuple(growing),
        fixed_state=fixed,
        capacity=weights + pools + fixed * engine.options.max_batch,
        block_tokens=paged.block_size,
    )
