"""Requests in flight become linear: tokens, memory and faults (specification §16, 29 to 33)."""

from __future__ import annotations

import pytest

from fxgraft.errors import InputError
from fxgraft.passes.dsla.fold import choices_of
from fxgraft.runtime.dsla_serve import DslaServe, Rules
from fxgraft.runtime.engine import Change
from tests.runtime.dsla._models import (
    BLOCK,
    CONTEXT,
    ORDER,
    Scripted,
    compiled,
    engine_of,
    program,
    switched,
)
from tests.runtime.engine._models import assert_nothing_held, greedy, prompt, run


def test_the_order_of_the_pass_is_kept() -> None:
    assert list(choices_of(program()).values()) == list(ORDER)


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_mixed_batch_equals_switching_each_request_at_its_position(lookahead: bool) -> None:
    plan = {
        "request-0": [(1, 2), (12, 0)],
        "request-1": [(17, 2)],
        "request-2": [(1, 2), (1, 0)],
    }
    policy = Scripted(plan)
    engine = engine_of(policy, lookahead=lookahead)
    lengths = (9, 14, 3, 11)
    requests = [engine.submit(prompt(n, n), greedy(9)) for n in lengths]
    run(engine)
    assert {request: sorted(places) for request, places in policy.switched.items()} == {
        "request-0": [0, 2], "request-1": [2], "request-2": [0, 2],
    }  # fmt: skip
    for request, length in zip(requests, lengths, strict=True):
        places = policy.switched.get(request.id, {})
        assert request.tokens == switched(prompt(length, length), 9, places)
    assert policy.prefilling_seen
    assert_nothing_held(engine)


def test_linear_from_the_start_equals_the_static_model() -> None:
    engine = engine_of(DslaServe(program(), Rules(floor=1.0), CONTEXT))
    request = engine.submit(prompt(13), greedy(8))
    run(engine)
    assert request.choices == {"dsla_layer_2": 1, "dsla_layer_0": 1}
    assert request.tokens == switched(prompt(13), 8, {2: 0, 0: 0})
    assert request.tokens != compiled().generate(
        [prompt(13)], max_new_tokens=8, eos_token_id=[]
    )[0, 13:].tolist()  # fmt: skip
    assert_nothing_held(engine)


def test_blocks_of_converted_layers_are_free_at_once() -> None:
    policy = Scripted({"request-0": [(14, 2), (18, 0)]})
    engine = engine_of(policy)
    [group] = engine.memory.groups
    request = engine.submit(prompt(9), greedy(14))
    per_page: list[int] = []
    while engine.step():
        if request.holding is not None and request.row is not None:
            per_page.append((group.total - group.free) // len(request.holding.pages[0]))
            assert len(request.holding.pages[0]) == -(-request.past // BLOCK)
    assert per_page == sorted(per_page, reverse=True)
    assert set(per_page) == {3, 2, 1}
    assert_nothing_held(engine)


def test_gates_that_read_the_input_compute_the_request_again() -> None:
    policy = Scripted({"request-0": [(11, 2)]}, "lowrank")
    engine = engine_of(policy, "lowrank")
    request, other = (engine.submit(prompt(9, seed), greedy(8)) for seed in (0, 1))
    run(engine)
    assert (request.preemptions, other.preemptions) == (1, 0)
    assert request.choices["dsla_layer_2"] == 1
    assert len(request.tokens) == 8
    assert policy.gauges()["dsla_recomputed"] == 1
    assert_nothing_held(engine)


def test_a_crunch_converts_instead_of_taking_state_away() -> None:
    """Memory for two full requests: softmax has to take state away more often."""
    model = engine_of(None).model
    slots = sum(pool.numel() * pool.element_size() for pool in model.slot_pools)
    memory = slots + 70 * model.paged.groups[0].block_bytes
    ceilings = ((0, 1.0),)
    rules = Rules(high=0.6, low=0.5, calm=0.4, hard_ceiling=1.0, ceilings=ceilings)
    preemptions: list[int] = []
    for policy in (None, DslaServe(program(), rules, CONTEXT)):
        engine = engine_of(policy, memory_bytes=memory, max_context=48)
        requests = [engine.submit(prompt(12, seed), greedy(30)) for seed in range(4)]
        run(engine)
        assert [len(request.tokens) for request in requests] == [30] * 4
        preemptions.append(engine.stats().preemptions)
        assert_nothing_held(engine)
    assert preemptions[0] > preemptions[1]


def test_calm_engines_never_convert() -> None:
    lines: list[str] = []
    engine = engine_of(DslaServe(program(), Rules(), CONTEXT, lines.append))
    request = engine.submit(prompt(9), greedy(8))
    run(engine)
    assert request.tokens == switched(prompt(9), 8, {})
    assert engine.stats().policy["dsla_conversions"] == 0
    assert lines == []


def test_a_prompt_that_is_taken_in_is_never_converted() -> None:
    class Early(Scripted):
        def decide(self, view: object) -> list[Change]:
            return [Change("request-1", "dsla_layer_2", 1)]

    engine = engine_of(Early({}), chunk_tokens=4)
    engine.submit(prompt(2), greedy(20))
    engine.submit(prompt(30), greedy(4))
    with pytest.raises(InputError, match="request-1"):
        run(engine)


def test_models_without_live_layers_are_refused() -> None:
    import fxgraft
    from tests import models

    with pytest.raises(InputError, match="no layer whose attention can be chosen"):
        DslaServe(fxgraft.capture(models.llama()), Rules(), CONTEXT)
