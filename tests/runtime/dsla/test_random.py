"""Requests come, go, are cancelled and become linear at random: nothing is lost (§16, 32, 33)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from fxgraft.passes.dsla.rewrite import CHOICE
from fxgraft.runtime.engine import Change, EngineView, Request
from tests.runtime.dsla._models import BLOCK, ORDER, Scripted, engine_of, switched
from tests.runtime.engine._models import assert_nothing_held, greedy, prompt, run


class Whims(Scripted):
    """Converts running requests at random, in the order of the pass, and notes where."""

    def __init__(self, seed: int) -> None:
        super().__init__({})
        self.chance = random.Random(seed)

    def decide(self, view: EngineView) -> Sequence[Change]:
        super().decide(view)
        found: list[Change] = []
        for request in view.running:
            places = self.switched.setdefault(request.id, {})
            left = [layer for layer in ORDER if layer not in places]
            if left and self.chance.random() < 0.08:
                places[left[0]] = request.tokens
                found.append(Change(request.id, f"{CHOICE}{left[0]}", 1))
        return found


@pytest.mark.slow
def test_no_token_is_lost_doubled_or_reordered() -> None:
    """1,000 operations; every answer is that of the request alone, switched where it was."""
    policy = Whims(7)
    engine = engine_of(policy, lookahead=True, max_batch=4)
    [group] = engine.memory.groups
    layers = len(engine.model.paged.groups[0].layers)
    chance = random.Random(3)
    seen: list[tuple[Request, list[int], int]] = []
    for _ in range(1000):
        action = chance.random()
        open_requests = [one for one, *_ in seen if not one.is_finished]
        if action < 0.1 and len(open_requests) < 8:
            tokens, count = prompt(chance.randint(1, 30), len(seen)), chance.randint(1, 20)
            seen.append((engine.submit(tokens, greedy(count)), tokens, count))
        elif action < 0.23 and open_requests:
            engine.cancel(chance.choice(open_requests))
        else:
            engine.step()
        held = sum(
            -(-one.past // BLOCK) * (layers - sum(one.choices.values()))
            for one, *_ in seen
            if one.holding is not None and one.row is not None
        )
        assert group.total - group.free >= held
    run(engine)
    assert_nothing_held(engine)
    converted = 0
    for request, tokens, count in seen:
        places = policy.switched.get(request.id, {})
        expected = switched(tokens, count, places)
        answer = request.tokens
        assert answer == expected[: len(answer)]
        assert len(answer) == count or request.finish_reason == "cancelled"
        converted += bool(places)
    assert converted > 15
    assert engine.stats().finished > 40
