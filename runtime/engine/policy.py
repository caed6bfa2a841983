"""Policies that change the op of a layer for a request while it runs.

A Program offers the choice: a node ``fxgraft::choose_rows`` whose ``choice`` is an input with one
value per row (see ``fxgraft.kernels.choose_rows.op``). The engine keeps each request's choices,
asks the policy once per step, has it convert the state, and gives back what the old op held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

States = Mapping[int, Mapping[str, Tensor]]


@dataclass(frozen=True)
class RequestView:
    """A request as a policy sees it.

    Attributes:
        id: of the request.
        tokens: whose state it holds.
        choices: by name of the choice input.
        arrived: seconds of ``time.monotonic``.
        prompt: tokens of its prompt.
        held_bytes: bytes of the blocks that it holds.
        promised_bytes: bytes of further blocks that it takes if it gets all its tokens.
    """

    id: str
    tokens: int
    choices: Mapping[str, int]
    arrived: float
    prompt: int = 0
    held_bytes: int = 0
    promised_bytes: int = 0


@dataclass(frozen=True)
class EngineView:
    """The engine's load as a policy sees it.

    Attributes:
        running: requests that generate; only these can be changed.
        queued: requests that wait.
        blocks_free: blocks per group that hold nothing, or nothing in use.
        blocks_total: blocks per group.
        options: for each choice, the numbers of the ops behind each option.
        prefilling: requests whose prompt is being taken in.
        block_bytes: bytes of a block per group.
        time: seconds of ``time.monotonic``.
        finish_interval: mean seconds between the ends of recent requests, 0 if unknown.
    """

    running: Sequence[RequestView]
    queued: int
    blocks_free: Sequence[int]
    blocks_total: Sequence[int]
    options: Mapping[str, tuple[tuple[int, ...], ...]]
    prefilling: Sequence[RequestView] = ()
    block_bytes: Sequence[int] = field(default_factory=tuple[int, ...])
    time: float = 0.0
    finish_interval: float = 0.0


@dataclass(frozen=True)
class Change:
    """Let a request take another op.

    Attributes:
        request: id of a running request.
        choice: name of the choice input.
        option: number of the op to take from now on.
    """

    request: str
    choice: str
    option: int


class LayerPolicy(Protocol):
    """Decides which op each layer of each request uses."""

    def start(self, view: EngineView, request: RequestView) -> Mapping[str, int]:
        """The choices with which a request that waits would begin now; 0 where it names none."""
        ...

    def decide(self, view: EngineView) -> Sequence[Change]:
        """What to change before the next step; must be cheap."""
        ...

    def convert(self, change: Change, states: States) -> States | None:
        """State of the new ops from that of the old ones; None to compute the request again.

        Args:
            change: what was decided.
            states: by number of the old op and name of the state; growing state [1, ..., T, ...],
                fixed state [1, ...].

        Returns:
            The same for the new ops, on the same device.
        """
        ...

    def gauges(self) -> Mapping[str, float]:
        """Numbers for the status page and for metrics, by name."""
        ...
