"""Step-cost tables: prices against a slow oracle, round trips, and everything that is refused."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxgraft.cost_table import (
    Energy,
    Growing,
    Identity,
    Memory,
    Origin,
    Part,
    StepCostTable,
    Validity,
)
from fxgraft.errors import InputError, SerializationError

IDENTITY = Identity(
    model="m", backend="b", device="d", weights="int8", activations="int8", state="int8"
)
VALIDITY = Validity(tokens=(1, 40), sequences=(1, 6), new_tokens=(1, 40), context=(0, 50))
AXES = {
    ("step", "tokens"): (1, 3, 10, 40), ("step", "sequences"): (1, 4, 6),
    ("prefill", "new_tokens"): (1, 7, 40), ("prefill", "context"): (0, 20, 50),
    ("decode", "batch"): (1, 2, 6), ("decode", "context"): (1, 13, 64),
}  # fmt: skip
KINDS: list[tuple[str, tuple[str, ...]]] = [
    ("step", ()), ("step", ("tokens",)), ("step", ("sequences",)),
    ("prefill", ()), ("prefill", ("new_tokens",)), ("prefill", ("context", "new_tokens")),
    ("prefill", ("new_tokens", "context")), ("decode", ("batch", "context")),
    ("decode", ("context", "batch")), ("decode", ("batch",)), ("decode", ("context",)),
]  # fmt: skip


def make(seed: int, kinds: Sequence[int] | None = None) -> StepCostTable:
    """A table with random parts."""
    random_ = random.Random(seed)
    chosen = list(range(len(KINDS))) if kinds is None else kinds
    parts: list[Part] = []
    for index, kind in enumerate(chosen):
        per, names = KINDS[kind]
        axes = {name: AXES[per, name] for name in names}
        size = int(np.prod([len(knots) for knots in axes.values()], initial=1))
        values = [tuple(random_.random() + 0.01 for _ in range(size)) for _ in range(2)]
        parts.append(
            Part(name=str(index), per=per, axes=axes, seconds=values[0], joules=values[1])  # pyright: ignore[reportArgumentType]
        )
    return StepCostTable(
        identity=IDENTITY,
        memory=Memory(weights=7, growing=(Growing(bytes_per_token=4, limit=8),), fixed_state=3),
        energy=Energy(source="formula", idle_watts=1.5),
        origin=Origin(method="formula", points=3),
        validity=VALIDITY,
        parts=tuple(parts),
    )


def between(knots: Sequence[int], point: float) -> list[tuple[int, float]]:
    """Indices and weights of the knots around a point."""
    for i, (low, high) in enumerate(itertools.pairwise(knots)):
        if low <= point <= high:
            weight = (point - low) / (high - low)
            return [(i, 1 - weight), (i + 1, weight)]
    raise AssertionError(point)


def slow(part: Part, values: Sequence[float], point: dict[str, float]) -> float:
    """Interpolation written out."""
    around = [between(knots, point[name]) for name, knots in part.axes.items()]
    total = 0.0
    for corner in itertools.product(*around):
        index = 0
        for (place, _), knots in zip(corner, part.axes.values(), strict=True):
            index = index * len(knots) + place
        total += values[index] * float(np.prod([weight for _, weight in corner]))
    return total


def slow_price(
    table: StepCostTable, prefills: Sequence[tuple[int, int]], decodes: int, context: int
) -> tuple[float, float]:
    found = [0.0, 0.0]
    count = len(prefills) + decodes
    tokens = decodes + sum(new for new, _ in prefills)
    for part in table.parts:
        for field, values in enumerate((part.seconds, part.joules or ())):
            if part.per == "step" and count:
                found[field] += slow(part, values, {"tokens": tokens, "sequences": count})
            if part.per == "prefill":
                for new, cached in prefills:
                    found[field] += slow(part, values, {"new_tokens": new, "context": cached})
            if part.per == "decode" and decodes:
                point = {"batch": decodes, "context": context / decodes}
                found[field] += slow(part, values, point)
    return found[0], found[1]


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, int]:
    prefills = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 50)), max_size=3))
    decodes = draw(st.integers(0, 3))
    context = draw(st.integers(decodes, 50 * decodes)) if decodes else 0
    return prefills, decodes, context


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 5), st.lists(st.sampled_from(range(len(KINDS))), min_size=1), steps())
def test_prices_equal_the_written_out_sum(
    seed: int, kinds: list[int], step: tuple[list[tuple[int, int]], int, int]
) -> None:
    table = make(seed, kinds)
    found = table.price(*step)
    assert (found.seconds, found.joules) == pytest.approx(slow_price(table, *step), rel=1e-12)
    assert not found.extrapolated


def test_the_order_of_pricing_does_not_matter() -> None:
    rng = random.Random(1)
    work: list[tuple[list[tuple[int, int]], int, int]] = []
    for _ in range(300):
        decodes = rng.randint(1, 3)
        prefills = [(rng.randint(1, 12), rng.randint(0, 50))] * rng.randint(0, 2)
        work.append((prefills, decodes, rng.randint(decodes, 50 * decodes)))
    first, second = make(3).pricer(), make(3).pricer()
    forward = [first.price(*step) for step in work]
    assert forward == [second.price(*step) for step in reversed(work)][::-1]


def test_lookup_equals_price_of_equal_sequences() -> None:
    table = make(2)
    batch, new, context = np.arange(1, 4)[:, None], np.asarray([1, 5, 13]), 20
    found = table.lookup("prefill", batch=batch, new_tokens=new, context=context)
    assert found.joules is not None
    for i, b in enumerate(range(1, 4)):
        for j, n in enumerate((1, 5, 13)):
            price = table.price([(n, 20)] * b)
            assert found.seconds[i, j] == pytest.approx(price.seconds, rel=1e-12)
            assert found.joules[i, j] == pytest.approx(price.joules, rel=1e-12)
    decode = table.lookup("decode", batch=[1, 2, 3], context=11)
    expected = [table.price((), b, 11 * b).seconds for b in (1, 2, 3)]
    np.testing.assert_allclose(decode.seconds, expected, rtol=1e-12)


def test_a_decode_line_gives_the_prices_up_to_its_end() -> None:
    pricer = make(4).pricer()
    for decodes in (1, 3, 6):
        context = decodes
        while context < 50 * decodes:
            line = pricer.decode_line(decodes, context)
            assert (line.first, context < line.last <= 50 * decodes) == (context, True)
            for sum_ in {context, (context + line.last) // 2, line.last}:
                seconds, joules, _ = pricer.price((), decodes, sum_)
                more = sum_ - context
                assert line.seconds + line.seconds_per_key * more == pytest.approx(seconds)
                assert line.joules + line.joules_per_key * more == pytest.approx(joules)
            context = line.last


def test_a_file_gives_back_the_same_table(tmp_path: Path) -> None:
    table = make(5)
    path = table.save(tmp_path / "deep" / "table.json")
    loaded = StepCostTable.load(path)
    assert loaded == table
    assert loaded.parts[3].seconds == table.parts[3].seconds
    assert loaded.to_json() == table.to_json()
    first = path.read_bytes()
    assert loaded.save(path).read_bytes() == first


def test_the_empty_step_costs_nothing() -> None:
    assert make(0).price() == (0.0, 0.0, False)


def test_without_energy_there_are_no_joules() -> None:
    part = Part(name="all", per="step", axes={}, seconds=(2.0,))
    table = make(0).model_copy(update={"parts": (part,), "energy": Energy()})
    assert table.price(decodes=1, decode_context=1) == (2.0, None, False)
    assert table.lookup("decode", batch=1, context=1).joules is None
    assert table.price().joules is None


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (([(41, 0)], 0, 0), "new_tokens 41"),
        (([(4, 51)], 0, 0), "context 51"),
        (([(38, 0)], 3, 30), "tokens 41"),
        (([], 7, 70), "sequences 7"),
        (([], 2, 102), "context 51"),
    ],
)
def test_a_step_outside_is_refused_or_marked(
    step: tuple[list[tuple[int, int]], int, int], name: str
) -> None:
    table = make(6)
    with pytest.raises(InputError, match=rf"{name} is outside .* valid from \d+ to \d+"):
        table.price(*step)
    found = table.pricer("mark").price(*step)
    assert found.extrapolated
    assert found.seconds > 0
    assert not table.pricer("mark").price([(4, 4)]).extrapolated


def test_extrapolation_goes_on_linearly_and_does_not_fall() -> None:
    def table(last: float) -> StepCostTable:
        part = Part(name="p", per="step", axes={"tokens": (1, 40)}, seconds=(1.0, last))
        return make(0).model_copy(update={"parts": (part,), "energy": Energy()})

    assert table(79.0).pricer("mark").price([(60, 0)]).seconds == pytest.approx(119.0)
    assert table(0.5).pricer("mark").price([(60, 0)]).seconds == pytest.approx(0.5)
    decode = Part(name="p", per="decode", axes={"batch": (1, 6)}, seconds=(6.0, 1.0))
    falling = make(0).model_copy(update={"parts": (decode,), "energy": Energy()})
    assert falling.pricer("mark").price((), 60, 600).seconds == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.price([(0, 4)]), "0 new and 4 cached"),
        (lambda t: t.price([(1, -1)]), "1 new and -1 cached"),
        (lambda t: t.price((), 3, 2), "3 decodes with 2 keys"),
        (lambda t: t.price((), -1, 2), "-1 decodes"),
        (lambda t: t.lookup("decode", batch=1, new_tokens=2, context=3), "not 1 in decode"),
        (lambda t: t.lookup("decode", batch=7, context=3), "sequences 7"),
        (lambda t: t.lookup("decode", batch=1, context=float("nan")), "context nan"),
        (lambda t: t.lookup("prefill", batch=3, new_tokens=20, context=0), "tokens 60"),
        (lambda t: t.pricer("guess"), "'outside' is 'guess'"),
    ],
)
def test_impossible_steps_are_refused_in_either_mode(
    call: Callable[[StepCostTable], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(make(0))


def test_impossible_steps_are_not_extrapolated() -> None:
    with pytest.raises(InputError, match="impossible"):
        make(0).pricer("mark").price((), 3, 2)


def set_at(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        target: Any = content
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("version", value=2), "version 2"),
        (set_at("format", value="other"), "no step-cost table"),
        (set_at("surprise", value=1), "surprise"),
        (set_at("identity", "colour", value="red"), "colour"),
        (lambda c: c["identity"].pop("model"), "model"),
        (set_at("parts", value=[]), "parts"),
        (set_at("parts", 1, "seconds", 0, value=-1.0), "seconds"),
        (set_at("parts", 1, "seconds", 0, value="1.0"), "seconds"),
        (set_at("parts", 1, "seconds", 0, value=None), "seconds"),
        (set_at("parts", 1, "seconds", value=[1.0]), "1 seconds for 4 knots"),
        (set_at("parts", 1, "joules", value=[1.0]), "1 joules for 4 knots"),
        (set_at("parts", 1, "joules", value=None), "joules"),
        (set_at("parts", 1, "axes", value={"tokens": [1, 3, 3, 40]}), "do not increase"),
        (set_at("parts", 1, "axes", value={"tokens": [1, 3, 10, 39]}), "needs 1 to 40"),
        (set_at("parts", 1, "axes", value={"context": [1, 3, 10, 40]}), "has axis 'context'"),
        (set_at("parts", 1, "axes", value={"tokens": [1, 40], "sequences": [1, 6]}), "one axis"),
        (set_at("parts", 1, "axes", value={"tokens": [1.5, 40]}), "tokens"),
        (set_at("parts", 1, "name", value="0"), "one name"),
        (set_at("validity", "context", value=[5, 4]), "empty: 5 to 4"),
        (set_at("memory", "weights", value=-1), "weights"),
        (set_at("energy", "source", value="none"), "joules"),
    ],
)
def test_a_wrong_file_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = make(7).to_json()
    change(content)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SerializationError, match=message):
        StepCostTable.load(path)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"format": 1, "format": 2}', "nan"])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(SerializationError, match=r"table\.json"):
        StepCostTable.load(path)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, literal: str) -> None:
    path = tmp_path / "table.json"
    table = make(8)
    first = json.dumps(table.parts[0].seconds[0])
    path.write_text(json.dumps(table.to_json()).replace(first, literal))
    with pytest.raises(SerializationError):
        StepCostTable.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SerializationError, match=r"absent\.json"):
        StepCostTable.load(tmp_path / "absent.json")


def test_memory_of_a_sequence_stops_growing_at_a_window() -> None:
    memory = Memory(
        weights=1, fixed_state=5,
        growing=(Growing(bytes_per_token=3), Growing(bytes_per_token=10, limit=4)),
    )  # fmt: skip
    assert memory.bytes_per_token == 13
    assert [memory.sequence_bytes(n) for n in (0, 1, 4, 6)] == [5, 18, 57, 63]
