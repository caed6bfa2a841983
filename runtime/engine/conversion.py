"""Carrying out what a policy decides: other ops for requests that are running."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.append_pages.reference import write_pages
from fxgraft.paging import PagedProgram, Pool
from fxgraft.runtime.engine.batch import Batch, upload
from fxgraft.runtime.engine.memory import Holding, StateMemory
from fxgraft.runtime.engine.policy import Change, EngineView, LayerPolicy, RequestView, States
from fxgraft.runtime.engine.request import Request


def places(paged: PagedProgram, ops: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Group and place in it of those ops that have growing state."""
    for index, group in enumerate(paged.groups):
        for op in ops:
            if op in group.layers:
                yield index, group.layers.index(op)


class Conversion:
    """Asks a policy once per step, and carries out what it decides.

    Args:
        policy: decides and converts.
        batch: the running requests.
        memory: what they hold.
    """

    def __init__(self, policy: LayerPolicy, batch: Batch, memory: StateMemory) -> None:
        self._policy, self._batch, self._memory = policy, batch, memory
        self._paged = batch.model.paged

    def apply(self, queued: int) -> None:
        """Change what the policy says.

        Args:
            queued: requests that wait.

        Raises:
            InputError: it named a request that is not running, or an op that does not exist.
        """
        for change in self._policy.decide(self._view(queued)):
            request = next((r for r in self._batch.requests if r.id == change.request), None)
            options = self._paged.choices.get(change.choice)
            if request is None or options is None or not 0 <= change.option < len(options):
                raise InputError(
                    f"the policy wants {change}, but no such request is running, or no such "
                    "choice exists",
                    "change requests and choices that the view shows",
                )
            if request.choices[change.choice] != change.option:
                self._convert(request, change)

    def _view(self, queued: int) -> EngineView:
        groups = self._memory.groups
        return EngineView(
            running=[
                RequestView(request.id, request.past, dict(request.choices), request.arrived)
                for request in self._batch.requests
            ],
            queued=queued,
            blocks_free=[group.free + group.idle for group in groups],
            blocks_total=[group.total for group in groups],
            options={name: len(ops) for name, ops in self._paged.choices.items()},
        )

    def _convert(self, request: Request, change: Change) -> None:
        holding = request.holding
        assert holding is not None
        options = self._paged.choices[change.choice]
        old, new = options[request.choices[change.choice]], options[change.option]
        wanted = list(places(self._paged, new))
        if not all(self._can_restore(holding, place) for place in wanted):
            return
        states = {op: self._read_state(holding, op, request.past) for op in old}
        converted = self._policy.convert(change, states)
        for group, place in wanted:
            self._memory.restore_op(holding, group, place)
        for op in new:
            self._write_state(holding, op, converted)
        for group, place in places(self._paged, old):
            self._memory.drop_op(holding, group, place)
        request.choices[change.choice] = change.option
        self._batch.refresh(request, holding)

    def _can_restore(self, holding: Holding, place: tuple[int, int]) -> bool:
        group = self._memory.groups[place[0]]
        return group.free + group.idle >= len(holding.pages[place[0]])

    def _read_state(self, holding: Holding, op: int, past: int) -> dict[str, Tensor]:
        """State of one op of a request with ``past`` tokens, as ``LayerPolicy.convert`` sees it."""
        found: dict[str, Tensor] = {}
        for pool, tensor, blocks in self._pools_of(holding, op):
            name = _state_name(pool, op)
            if blocks is None:
                found[name] = tensor[holding.slot : holding.slot + 1]
                continue
            dense = tensor[blocks.long()].movedim(pool.dim, 1).flatten(0, 1)[:past]
            found[name] = dense.unsqueeze(0).movedim(1, pool.dim)
        return found

    def _write_state(self, holding: Holding, op: int, states: States) -> None:
        for pool, tensor, blocks in self._pools_of(holding, op):
            value = states[op][_state_name(pool, op)].to(tensor.dtype)
            if blocks is None:
                tensor[holding.slot].copy_(value[0])
            else:
                zero = torch.zeros(1, dtype=torch.int32, device=tensor.device)
                write_pages(value, tensor, blocks[None], zero, pool.dim)

    def _pools_of(self, holding: Holding, op: int) -> Iterator[tuple[Pool, Tensor, Tensor | None]]:
        """The pools in which an op has state; with its blocks, or None for a slot."""
        paged, model = self._paged, self._batch.model
        for group, place in places(paged, [op]):
            pages = holding.pages[group]
            ids = np.array([0 if page is None else page.blocks[place] for page in pages], np.int32)
            blocks = upload(ids, model.device)
            for pool, tensor in zip(
                paged.groups[group].pools, model.block_pools[group], strict=True
            ):
                yield pool, tensor, blocks
        for pool, tensor in zip(paged.slot_pools, model.slot_pools, strict=True):
            if pool.states[0].startswith(f"{op}."):
                yield pool, tensor, None


def _state_name(pool: Pool, op: int) -> str:
    prefix = f"{op}."
    return next(s.removeprefix(prefix) for s in pool.states if s.startswith(prefix))
