"""Policies: a request's layer takes another op while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.runtime.engine import Change, EngineView, RequestView
from fxgraft.runtime.engine.policy import States
from tests.runtime.engine._models import (
    assert_nothing_held,
    choosing_program,
    engine_of,
    greedy,
    prompt,
    run,
)


class Switch:
    """Gives requests with a prompt of ``length`` the other op once they hold ``tokens``."""

    def __init__(self, tokens: int, length: int = 9) -> None:
        self.tokens, self.length = tokens, length
        self.views: list[EngineView] = []
        self.converted: list[States] = []

    def start(self, view: EngineView, request: RequestView) -> Mapping[str, int]:
        return {}

    def decide(self, view: EngineView) -> Sequence[Change]:
        self.views.append(view)
        return [
            Change(request.id, "mode", 1)
            for request in view.running
            if request.id == "request-0" and request.tokens >= self.tokens
        ]

    def convert(self, change: Change, states: States) -> States:
        self.converted.append(states)
        # Both ops keep the same keys and values.
        [(old, state)] = states.items()
        return {1 - old: dict(state)}

    def gauges(self) -> Mapping[str, float]:
        return {}


def expected(tokens: list[int], count: int, switch: int) -> list[int]:
    """Greedy tokens by whole sequences, whose tokens from ``switch`` on see the other op."""
    program = choosing_program()
    module = program.graph_module

    def by_position(mode: Tensor, options: Sequence[Tensor]) -> Tensor:
        return torch.cat([options[0][:, :, :switch], options[1][:, :, switch:]], 2)

    for node in module.graph.nodes:
        if node.target is torch.ops.fxgraft.choose_rows.default:
            node.target = by_position
    module.recompile()
    known = list(tokens)
    for _ in range(count):
        ids = torch.tensor([known])
        values = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(len(known))[None],
            "mode": torch.zeros(1, dtype=torch.int64),
        }
        logits = module(*(values[spec.name] for spec in program.inputs))[0]
        known.append(int(logits[0, -1].argmax()))
    return known[len(tokens) :]


def test_the_other_op_is_another_model() -> None:
    tokens = prompt(9)
    assert expected(tokens, 8, 0) != expected(tokens, 8, 100)


def test_without_a_policy_the_first_op_is_taken() -> None:
    engine = engine_of("choosing")
    request = engine.submit(prompt(9), greedy(8))
    run(engine)
    assert request.tokens == expected(prompt(9), 8, 100)
    assert_nothing_held(engine)


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_running_request_changes_and_the_others_do_not(lookahead: bool) -> None:
    policy = Switch(tokens=9)
    engine = engine_of("choosing", policy, lookahead=lookahead, prefix_reuse=False)
    changed, same = (engine.submit(prompt(9, seed), greedy(8)) for seed in (0, 1))
    freed: list[int] = []
    while engine.step():
        freed.append(engine.memory.groups[0].free)
    assert same.tokens == expected(prompt(9, 1), 8, 100)
    assert len(policy.converted) == 1
    [state] = policy.converted[0].values()
    # The step after the prompt's end was launched before the policy saw the request.
    assert {value.shape[-2] for value in state.values()} == {10}
    assert changed.choices == {"mode": 1}
    assert changed.tokens == expected(prompt(9), 8, 10)
    assert changed.tokens != expected(prompt(9), 8, 100)
    assert_nothing_held(engine)


def test_blocks_of_the_op_that_is_left_come_back() -> None:
    policy = Switch(tokens=12)
    engine = engine_of("choosing", policy, lookahead=False, prefix_reuse=False)
    whole, windowed = engine.memory.groups
    assert (whole.ops, windowed.ops) == (3, 1)
    request = engine.submit(prompt(9), greedy(12))
    seen: set[tuple[bool, int, bool]] = set()
    while engine.step():
        if request.row is not None and request.holding is not None:
            used = whole.total - whole.free
            per_page = used // len(request.holding.pages[0])
            seen.add((bool(policy.converted), per_page, windowed.free < windowed.total))
    assert seen == {(False, 3, False), (True, 2, True)}
    assert_nothing_held(engine)


def test_a_policy_that_names_no_running_request() -> None:
    class Wrong(Switch):
        def decide(self, view: EngineView) -> Sequence[Change]:
            return [Change("request-9", "mode", 1)]

    engine = engine_of("choosing", Wrong(1))
    engine.submit(prompt(3), greedy())
    with pytest.raises(InputError, match="request-9"):
        run(engine)
