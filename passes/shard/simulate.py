"""All ranks in one process: one thread each, whose collectives meet in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxgraft import interpreter
from fxgraft.collectives import ops
from fxgraft.program import Program

StandIns = Mapping[Any, Callable[..., Any]]
"""What a rank calls instead of each collective."""
Result = TypeVar("Result")


def run_ranks(
    programs: Sequence[Program],
    inputs: Sequence[Mapping[str, Tensor]],
    *,
    verify: bool = False,
    kept: Sequence[dict[str, Any] | None] | None = None,
) -> list[dict[str, Tensor]]:
    """Run the shares of one model together.

    Args:
        programs: of all ranks, in order.
        inputs: of each rank, by name.
        verify, kept: see ``fxgraft.interpreter.run``; ``kept`` one per rank.

    Returns:
        Each rank's outputs by name.

    Raises:
        GraphError: an operator of some rank fails; names the node.
    """

    def run(rank: int, stand_ins: StandIns) -> dict[str, Tensor]:
        store = kept[rank] if kept else None
        return interpreter.run(
            programs[rank], inputs[rank], verify=verify, kept=store, stand_ins=stand_ins
        )

    return together(len(programs), run)


def together(size: int, work: Callable[[int, StandIns], Result]) -> list[Result]:
    """Do something on every rank at once, each in a thread of its own.

    Args:
        size: number of ranks.
        work: given a rank and what it is to call instead of the collectives.

    Raises:
        Exception: what the rank that failed first raised.
    """
    meeting = _Meeting(size)

    def run(rank: int) -> Result:
        try:
            return work(rank, meeting.stand_ins(rank))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        # A rank that failed makes the others fail at their next collective.
        raise min(errors, key=lambda error: "BrokenBarrierError" in str(error))
    return [future.result() for future in futures]


def _done(value: Tensor) -> Tensor:
    return value


class _Meeting:
    """Where the threads exchange tensors."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._values: list[Tensor] = [torch.empty(0)] * size

    def abort(self) -> None:
        self._barrier.abort()

    def stand_ins(self, rank: int) -> StandIns:
        """For one rank."""

        def all_reduce(value: Tensor, operation: str, group: object) -> Tensor:
            assert operation == "sum"
            return torch.stack(self._exchange(rank, value)).sum(0)

        def all_gather(value: Tensor, size: int, group: object) -> Tensor:
            return torch.cat(self._exchange(rank, value))

        return {
            ops.all_reduce.default: all_reduce,
            ops.all_gather_into_tensor.default: all_gather,
            ops.wait_tensor.default: _done,
        }

    def _exchange(self, rank: int, value: Tensor) -> list[Tensor]:
        """All ranks' values; every rank takes them before any rank may bring the next one."""
        self._values[rank] = value
        self._barrier.wait()
        taken = list(self._values)
        self._barrier.wait()
        return taken
