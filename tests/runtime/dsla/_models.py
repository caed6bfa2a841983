"""A tiny Llama whose layers can become linear while it serves, and what it answers then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

import fxgraft
from fxgraft.passes.dsla import Dsla, Form
from fxgraft.passes.dsla.rewrite import CHOICE
from fxgraft.program import Program
from fxgraft.runtime.dsla_serve import DslaServe, Rules
from fxgraft.runtime.engine import Change, Engine, EngineOptions, EngineView, RequestView
from fxgraft.runtime.engine.policy import States
from tests import models

CONTEXT, BLOCK, LAYERS = 64, 4, 3
ORDER = (2, 0)


@cache
def program(gate: str = "key") -> Program:
    """Layers 2 and 0, in this order, can be linear."""
    form = Form.from_config({"gate": gate, "half_lives": [[8, 64], [2, 8]]})
    live = Dsla(layers=ORDER, live=True, form=form)
    return fxgraft.Pipeline.parse(["optimize", live]).run(fxgraft.capture(models.llama()))


@cache
def compiled(gate: str = "key") -> fxgraft.Compiled:
    """The same, lowered."""
    return fxgraft.compile(program(gate), backend="torch")


class Scripted(DslaServe):
    """Converts requests at given numbers of tokens instead of by load."""

    def __init__(self, plan: Mapping[str, Sequence[tuple[int, int]]], gate: str = "key") -> None:
        super().__init__(program(gate), Rules(), CONTEXT)
        self.plan = {request: list(steps) for request, steps in plan.items()}
        self.switched: dict[str, dict[int, int]] = {}
        self.prefilling_seen = False

    def start(self, view: EngineView, request: RequestView) -> Mapping[str, int]:
        return {}

    def decide(self, view: EngineView) -> Sequence[Change]:
        super().decide(view)
        self.prefilling_seen |= bool(view.prefilling)
        found: list[Change] = []
        for request in view.running:
            steps = self.plan.get(request.id, [])
            if steps and request.tokens >= steps[0][0]:
                _, layer = steps.pop(0)
                self.switched.setdefault(request.id, {})[layer] = request.tokens
                found.append(Change(request.id, f"{CHOICE}{layer}", 1))
        return found

    def convert(self, change: Change, states: States) -> States | None:
        return super().convert(change, states)


def engine_of(policy: Any, gate: str = "key", **options: Any) -> Engine:
    """An engine with room for 4 requests."""
    values: dict[str, Any] = {
        "max_batch": 4, "max_context": CONTEXT, "memory_bytes": 2**20, "block_size": BLOCK,
        "chunk_tokens": 16, "prefix_reuse": False, "lookahead": False,
    }  # fmt: skip
    return Engine(compiled(gate), EngineOptions(**{**values, **options}), policy=policy)


def switched(tokens: Sequence[int], count: int, places: Mapping[int, int]) -> list[int]:
    """Greedy tokens by whole sequences: from a layer's place on, tokens see linear attention.

    Args:
        tokens: the prompt.
        count: tokens to generate.
        places: by layer, the first position at which it is linear; softmax if not named.
    """
    copy = program().copy()
    module = copy.graph_module
    for node in copy.placeholders:
        for user in [u for u in node.users if node.name.startswith(CHOICE)]:
            place = places.get(int(node.name.removeprefix(CHOICE)), CONTEXT)
            user.target = _by_position(place)
    module.recompile()
    known = list(tokens)
    with torch.no_grad():
        for _ in range(count):
            logits = module(*copy.bind(torch.tensor([known])))[0]
            known.append(int(logits[0, -1].argmax()))
    return known[len(tokens) :]


def _by_position(place: int) -> Any:
    def by_position(mode: Tensor, options: Sequence[Tensor]) -> Tensor:
        return torch.cat([options[0][:, :, :place], options[1][:, :, place:]], 2)

    return by_position
