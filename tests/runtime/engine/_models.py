"""Compiled tiny models for tests of the engine, and what they answer alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import fxgraft
from fxgraft import graph as graphs
from fxgraft.generation.options import SamplingOptions
from fxgraft.program import Input, Program
from fxgraft.runtime.engine import Engine, EngineOptions, Request
from tests import models

CONTEXT, BLOCK = 64, 4


@cache
def compiled(family: str) -> fxgraft.Compiled:
    """A model of ``tests.models``, or one whose first layer can work in two ways."""
    if family == "choosing":
        return fxgraft.compile(choosing_program(), backend="torch")
    return fxgraft.compile(getattr(models, family)(), ["optimize"], backend="torch")


def choosing_program() -> Program:
    """A Llama with an input ``mode`` per row; mode 1 attends to 3 tokens in the first layer."""
    program = fxgraft.capture(models.llama()).copy()
    module = program.graph_module
    attention = torch.ops.fxgraft.attention.default
    with graphs.no_collection():
        node = next(n for n in module.graph.nodes if n.target is attention)
        last = program.placeholders[-1]
        with module.graph.inserting_after(last):
            mode = module.graph.placeholder("mode")
        ids = program.placeholders[0].meta["val"]
        mode.meta["val"] = ids.new_zeros(ids.shape[:1])
        other = graphs.insert(node, attention, node.args, {**node.kwargs, "window": 3}, after=True)
        chosen = graphs.insert(
            other, torch.ops.fxgraft.choose_rows.default, (mode, [node, other]), after=True
        )
        node.replace_all_uses_with(chosen, delete_user_cb=lambda user: user not in (chosen, other))
        graphs.finish(module)
    inputs = (*program.inputs, Input("mode", torch.int64, ("batch",), default="zeros"))
    return Program(
        module, inputs, program.outputs, program.dimensions, program.origin, program.history
    )


def engine_of(family: str, policy: Any = None, **options: Any) -> Engine:
    """An engine with room for 4 requests unless told otherwise."""
    values: dict[str, Any] = {
        "max_batch": 4, "max_context": CONTEXT, "memory_bytes": 2**22, "block_size": BLOCK,
        "chunk_tokens": 8,
    }  # fmt: skip
    return Engine(compiled(family), EngineOptions(**{**values, **options}), policy=policy)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, models.VOCABULARY, (length,), generator=generator).tolist()


def greedy(count: int = 10) -> SamplingOptions:
    """Exactly so many likeliest tokens."""
    return SamplingOptions(max_new_tokens=count, eos_token_id=())


def alone(family: str, tokens: list[int], sampling: SamplingOptions) -> list[int]:
    """What ``generate`` answers."""
    options: Any = sampling.model_dump(exclude_unset=True) | {"eos_token_id": []}
    return compiled(family).generate([tokens], **options)[0, len(tokens) :].tolist()


def run(engine: Engine) -> None:
    """Until nothing is left to do."""
    while engine.step():
        pass


def assert_nothing_held(engine: Engine) -> None:
    """Every block and slot is free, or kept for reuse only."""
    stats = engine.stats()
    assert (stats.queued, stats.prefilling, stats.running) == (0, 0, 0)
    assert (stats.blocks_used, stats.slots_used) == (0, 0)
    for group in engine.memory.groups:
        assert group.free + group.idle == group.total
    engine.memory.forget_prefixes()
    assert all(group.free == group.total for group in engine.memory.groups)


def answers(requests: list[Request]) -> list[list[int]]:
    """Their tokens."""
    return [request.tokens for request in requests]
