"""Carrying out what a policy decides: other ops for requests that are running."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.append_pages.reference import write_pages
from fxgraft.paging import PagedProgram, Pool
from fxgraft.runtime.engine.batch import Batch, upload
from fxgraft.runtime.engine.memory import Holding, StateMemory
from fxgraft.runtime.engine.policy import Change, EngineView, LayerPolicy, RequestView, States
from fxgraft.runtime.engine.request import Request

_ENDS = 16


def places(paged: PagedProgram, ops: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Group and place in it of those ops that have growing state."""
    for index, group in enumerate(paged.groups):
        for op in ops:
            if op in group.layers:
                yield index, group.layers.index(op)


def active_ops(
    paged: PagedProgram, choices: Mapping[str, int]
) -> list[npt.NDArray[np.bool_] | None]:
    """Per group, the ops that keep entries for a request with these choices; None for all."""
    found: list[npt.NDArray[np.bool_] | None] = [None] * len(paged.groups)
    for name, options in paged.choices.items():
        for option, ops in enumerate(options):
            if option == choices[name]:
                continue
            for group, place in places(paged, ops):
                active = found[group]
                if active is None:
                    active = np.ones(len(paged.groups[group].layers), dtype=np.bool_)
                    found[group] = active
                active[place] = False
    return found


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
        self._ends: deque[float] = deque(maxlen=_ENDS)

    def start(self, request: Request, queued: int, prefilling: Iterable[Request]) -> dict[str, int]:
        """The choices with which a request that waits would begin now."""
        view = self._view(queued, prefilling)
        return dict(self._policy.start(view, self._view_of(request)))

    def gauges(self) -> dict[str, float]:
        """What the policy tells of itself."""
        return dict(self._policy.gauges())

    def ended(self, now: float) -> None:
        """Take note that a request ended, at a time of ``time.monotonic``."""
        self._ends.append(now)

    def apply(self, queued: int, prefilling: Iterable[Request]) -> list[Request]:
        """Change what the policy says.

        Args:
            queued: requests that wait.
            prefilling: requests whose prompt is being taken in.

        Returns:
            Requests whose state could not be converted, to be computed again with other ops.

        Raises:
            InputError: it named a request that is not running, or an op that does not exist.
        """
        again: list[Request] = []
        for change in self._policy.decide(self._view(queued, prefilling)):
            request = next((r for r in self._batch.requests if r.id == change.request), None)
            options = self._paged.choices.get(change.choice)
            if request is None or options is None or not 0 <= change.option < len(options):
                raise InputError(
                    f"the policy wants {change}, but no such request is running, or no such "
                    "choice exists",
                    "change requests and choices that the view shows",
                )
            if request in again or request.choices[change.choice] == change.option:
                continue
            if not self._convert(request, change):
                request.choices[change.choice] = change.option
                again.append(request)
        return again

    def _view(self, queued: int, prefilling: Iterable[Request]) -> EngineView:
        groups = self._memory.groups
        ends = self._ends
        return EngineView(
            running=[self._view_of(request) for request in self._batch.requests],
            queued=queued,
            blocks_free=[group.free + group.idle for group in groups],
            blocks_total=[group.total for group in groups],
            options=self._paged.choices,
            prefilling=[self._view_of(request) for request in prefilling],
            block_bytes=[group.block_bytes for group in self._paged.groups],
            time=time.monotonic(),
            finish_interval=(ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else 0.0,
        )

    def _view_of(self, request: Request) -> RequestView:
        held, promised = self._bytes(request) if request.holding is not None else (0, 0)
        return RequestView(
            request.id, request.past, dict(request.choices), request.arrived,
            len(request.prompt), held, promised,
        )  # fmt: skip

    def _bytes(self, request: Request) -> tuple[int, int]:
        """Bytes of the blocks that a request holds, and of those that it may still take."""
        holding = request.holding
        assert holding is not None
        most = self._memory.pages_for(len(request.prompt) + request.sampling.max_new_tokens)
        held = promised = 0
        for group, pages, active in zip(
            self._paged.groups, holding.pages, holding.active, strict=True
        ):
            ops = len(group.layers) if active is None else int(np.count_nonzero(active))
            held += len(pages) * ops * group.block_bytes
            promised += max(most - len(pages), 0) * ops * group.block_bytes
        return held, promised

    def _convert(self, request: Request, change: Change) -> bool:
        """Let a request take another op; False if its state cannot be converted."""
        holding = request.holding
        assert holding is not None
        options = self._paged.choices[change.choice]
        old, new = options[request.choices[change.choice]], options[change.option]
        wanted = list(places(self._paged, new))
        if not all(self._can_restore(holding, place) for place in wanted):
            return True
        states = {op: self._read_state(holding, op, request.past) for op in old}
        converted = self._policy.convert(change, states)
        if converted is None:
            return False
        for group, place in wanted:
            self._memory.restore_op(holding, group, place)
        for op in new:
            self._write_state(holding, op, converted)
        for group, place in places(self._paged, old):
            self._memory.drop_op(holding, group, place)
        request.choices[change.choice] = change.option
        self._batch.refresh(request, holding)
        return True

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
