"""The policy: monotone, within ceilings, without flapping, replayable (specification §16, 34)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxgraft.errors import InputError
from fxgraft.runtime.dsla_serve import (
    Memory,
    Rules,
    Running,
    Snapshot,
    decide,
    replay,
    start_level,
)
from fxgraft.runtime.dsla_serve.replay import line_of

RULES = Rules()
LAYERS = OFFERED = 32
prompts = st.integers(1, 20_000)
requests = st.builds(
    lambda prompt, more, level: (prompt, prompt + more, level),
    prompts, st.integers(1, 4000), st.integers(0, 16),
)  # fmt: skip
memories = st.builds(
    Memory, level=st.integers(0, 24), rising=st.booleans(),
    calm_since=st.none() | st.floats(0, 100),
)  # fmt: skip


def snapshot(
    pressure: float, running: list[tuple[int, int, int]], time: float = 100.0, wait: float = 0.0
) -> Snapshot:
    rows = tuple(Running(f"request-{n}", *values) for n, values in enumerate(running))
    return Snapshot(time, pressure, wait, rows, LAYERS, OFFERED, 1e-8)


@given(st.lists(requests, max_size=8), memories, st.floats(0, 2), st.floats(0, 2), st.floats(0, 30))
def test_more_pressure_never_lowers_a_level(
    running: list[tuple[int, int, int]], memory: Memory, one: float, other: float, wait: float
) -> None:
    low, high = sorted((one, other))
    less = decide(RULES, snapshot(low, running, wait=wait), memory)
    more = decide(RULES, snapshot(high, running, wait=wait), memory)
    assert less.memory.level <= more.memory.level
    assert dict(less.raised).items() <= dict(more.raised).items()


@given(st.lists(requests, max_size=8), memories, st.floats(0, 2))
def test_ceilings_hold_and_running_levels_rise_by_one(
    running: list[tuple[int, int, int]], memory: Memory, pressure: float
) -> None:
    seen = snapshot(pressure, running)
    decision = decide(RULES, seen, memory)
    by_id = {request.id: request for request in seen.running}
    assert len(dict(decision.raised)) == len(decision.raised)
    for request, level in decision.raised:
        share = max(share for least, share in RULES.ceilings if by_id[request].prompt >= least)
        assert by_id[request].level + 1 == level <= share * LAYERS
    if memory.level <= RULES.hard_ceiling * LAYERS:
        assert decision.memory.level <= RULES.hard_ceiling * LAYERS
    for _, (prompt, _, _) in enumerate(running):
        share = max(share for least, share in RULES.ceilings if prompt >= least)
        assert start_level(RULES, decision.memory, prompt, LAYERS, OFFERED) <= share * LAYERS


def test_the_longest_request_of_the_largest_bucket_comes_first() -> None:
    rows = [(1000, 9000, 0), (9000, 9100, 0), (8200, 9900, 0), (3000, 3001, 0)]
    seen = snapshot(0.95, rows)
    slow = replace(seen, fold_seconds_per_token=1e-6)
    assert decide(RULES, slow, Memory()).raised == (("request-2", 1),)
    ordered = [request for request, _ in decide(RULES, seen, Memory()).raised]
    assert ordered == ["request-2", "request-1", "request-3", "request-0"]


def test_levels_rise_from_the_high_mark_to_the_low_one() -> None:
    rows = [(9000, 9100, 3)]
    memory = Memory()
    raised: list[bool] = []
    for pressure in (0.85, 0.91, 0.85, 0.76, 0.74, 0.85, 0.91):
        decision = decide(RULES, snapshot(pressure, rows), memory)
        memory = decision.memory
        raised.append(bool(decision.raised))
    assert raised == [False, True, True, True, False, False, True]


def test_a_long_queue_raises_levels_too() -> None:
    assert decide(RULES, snapshot(0.1, [(9000, 9100, 0)], wait=11.0), Memory()).raised
    assert not decide(RULES, snapshot(0.1, [(9000, 9100, 0)], wait=9.0), Memory()).raised


def test_new_requests_start_lower_only_after_calm() -> None:
    memory = Memory(level=5)
    levels: list[int] = []
    for second in range(100):
        decision = decide(RULES, snapshot(0.5, [], time=float(second)), memory)
        memory = decision.memory
        levels.append(memory.level)
    assert levels[:30] == [5] * 30
    assert levels[30:60] == [4] * 30
    assert levels[99] == 2


def test_a_square_wave_of_load_does_not_flap() -> None:
    """Busy and idle for 20 seconds each: levels of new requests never fall in between."""
    memory, levels = Memory(), list[int]()
    for second in range(400):
        busy = second // 20 % 2 == 0
        seen = snapshot(0.95 if busy else 0.3, [(9000, 9100, 20)], time=float(second))
        memory = decide(RULES, seen, memory).memory
        levels.append(memory.level)
    assert levels == sorted(levels)
    assert levels[-1] == RULES.hard_ceiling * LAYERS


def test_floors_apply_to_every_new_request() -> None:
    rules = Rules(floor=0.5)
    assert start_level(rules, Memory(), 10, 32, 32) == 16
    assert start_level(rules, Memory(), 10, 32, 8) == 8
    assert start_level(Rules(), Memory(level=9), 10, 32, 32) == 4
    assert start_level(Rules(), Memory(level=9), 9000, 32, 32) == 9


def test_decisions_replay_and_other_rules_can_be_tried() -> None:
    memory, lines = Memory(), list[str]()
    for second in range(50):
        seen = snapshot(second / 50, [(9000, 9100, 0), (100, 200, 1)], time=float(second))
        decision = decide(RULES, seen, memory)
        lines.append(line_of(RULES, seen, memory, decision))
        memory = decision.memory
    assert all(before == now for before, now in replay(lines))
    eager = [now for _, now in replay(lines, Rules(high=0.5, low=0.4, calm=0.3))]
    assert sum(len(d.raised) for d in eager) > sum(len(b.raised) for b, _ in replay(lines))
    with pytest.raises(InputError, match="line 2 is no decision"):
        list(replay([lines[0], "{}"]))
