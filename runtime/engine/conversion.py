"""Carrying out what a policy decides: other ops for requests that are running."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.append_pages.reference import write_pages
from fxgraft.paging import PagedProgram, Pool
from fxgraft.runtime.engine.batch import upload
from fxgraft.runtime.engine.memory import Holding
from fxgraft.runtime.engine.policy import Change, EngineView, RequestView
from fxgraft.runtime.engine.request import Request

if TYPE_CHECKING:
    from fxgraft.runtime.engine.engine import Engine


def places(paged: PagedProgram, ops: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Group and place in it of those ops that have growing state."""
    for index, group in enumerate(paged.groups):
        for op in ops:
            if op in group.layers:
                yield index, group.layers.index(op)


def view_of(engine: Engine) -> EngineView:
    """What a policy sees."""
    groups = engine.memory.groups
    return EngineView(
        running=[
            RequestView(request.id, request.past, dict(request.choices), request.arrived)
            for request in engine.batch.requests
        ],
        queued=len(engine.waiting),
        blocks_free=[group.free + group.idle for group in groups],
        blocks_total=[group.total for group in groups],
        options={name: len(ops) for name, ops in engine.model.paged.choices.items()},
    )


def apply(engine: Engine) -> None:
    """Ask the policy, and change what it says.

    Raises:
        InputError: it named a request that is not running, or an op that does not exist.
    """
    assert engine.policy is not None
    for change in engine.policy.decide(view_of(engine)):
        request = next((r for r in engine.batch.requests if r.id == change.request), None)
        options = engine.model.paged.choices.get(change.choice)
        if request is None or options is None or not 0 <= change.option < len(options):
            raise InputError(
                f"the policy wants {change}, but no such request is running, or no such choice "
                "exists",
                "change requests and choices that the view shows",
            )
        if request.choices[change.choice] != change.option:
            _convert(engine, request, change)


def _convert(engine: Engine, request: Request, change: Change) -> None:
    assert engine.policy is not None
    holding, paged = request.holding, engine.model.paged
    assert holding is not None
    options = paged.choices[change.choice]
    old, new = options[request.choices[change.choice]], options[change.option]
    wanted = list(places(paged, new))
    if not all(_can_restore(engine, holding, place) for place in wanted):
        return
    states = {op: read_state(engine, holding, op, request.past) for op in old}
    converted = engine.policy.convert(change, states)
    for group, place in wanted:
        engine.memory.restore_op(holding, group, place)
    for op in new:
        _write_state(engine, holding, op, converted[op])
    for group, place in places(paged, old):
        engine.memory.drop_op(holding, group, place)
    request.choices[change.choice] = change.option
    engine.batch.refresh(request, holding)


def _can_restore(engine: Engine, holding: Holding, place: tuple[int, int]) -> bool:
    group = engine.memory.groups[place[0]]
    return group.free + group.idle >= len(holding.pages[place[0]])


def read_state(engine: Engine, holding: Holding, op: int, past: int) -> dict[str, Tensor]:
    """State of one op of a request: growing state [1, ..., T, ...], fixed state [1, ...].

    Args:
        engine: the engine.
        holding: of the request.
        op: number of the op.
        past: tokens whose state it has.
    """
    found: dict[str, Tensor] = {}
    for pool, tensor, blocks in _pools_of(engine, holding, op):
        name = _state_name(pool, op)
        if blocks is None:
            found[name] = tensor[holding.slot : holding.slot + 1]
            continue
        dim = pool.dim
        dense = tensor[blocks.long()].movedim(dim, 1).flatten(0, 1)[:past]
        found[name] = dense.unsqueeze(0).movedim(1, dim)
    return found


def _write_state(engine: Engine, holding: Holding, op: int, states: Mapping[str, Tensor]) -> None:
    for pool, tensor, blocks in _pools_of(engine, holding, op):
        value = states[_state_name(pool, op)].to(tensor.dtype)
        if blocks is None:
            tensor[holding.slot].copy_(value[0])
        else:
            zero = torch.zeros(1, dtype=torch.int32, device=tensor.device)
            dim = pool.dim
            write_pages(value, tensor, blocks[None], zero, dim)


def _pools_of(
    engine: Engine, holding: Holding, op: int
) -> Iterator[tuple[Pool, Tensor, Tensor | None]]:
    """The pools in which an op has state; with its blocks, or None for a slot."""
    paged = engine.model.paged
    for group, place in places(paged, [op]):
        pages = holding.pages[group]
        ids = np.array([0 if page is None else page.blocks[place] for page in pages], np.int32)
        blocks = upload(ids, engine.model.device)
        for pool, tensor in zip(
            paged.groups[group].pools, engine.model.block_pools[group], strict=True
        ):
            yield pool, tensor, blocks
    for pool, tensor in zip(paged.slot_pools, engine.model.slot_pools, strict=True):
        if pool.states[0].startswith(f"{op}."):
            yield pool, tensor, None


def _state_name(pool: Pool, op: int) -> str:
    prefix = f"{op}."
    return next(s.removeprefix(prefix) for s in pool.states if s.startswith(prefix))
