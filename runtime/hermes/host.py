"""Host clients: pre- and post-processing on processor cores (spec section 6.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fxgraft.runtime.hermes.client import Place
from fxgraft.runtime.hermes.queueing import QueueClient
from fxgraft.runtime.hermes.request import Request
from fxgraft.runtime.hermes.stages import HOST_KINDS, Stage

MOST = 1 << 30


@dataclass(frozen=True, slots=True)
class Task:
    """Service time of one request.

    Attributes:
        seconds: that do not depend on the request.
        per_prompt_token: seconds for each token of the prompt.
        per_output_token: seconds for each token that was emitted.
        law: ``"constant"``, or ``"exponential"`` with that mean.
        truncate: most tokens of a prompt that are kept, 0 for all.
    """

    seconds: float = 0.0
    per_prompt_token: float = 0.0
    per_output_token: float = 0.0
    law: Literal["constant", "exponential"] = "constant"
    truncate: int = 0


class HostClient(QueueClient):
    """Processor cores.

    Args:
        name, place, idle_watts, dollars_per_hour: see ``Client``.
        tasks: by name; ``""`` for stages that name none.
        cores: that each run one task at a time.
        batched: run everything that waits in one step on all cores instead, as long as its
            longest task.
        watts: drawn by a core in a step.
        seed: of random service times.
    """

    kind = "host"

    def __init__(
        self,
        name: str,
        *,
        tasks: Mapping[str, Task],
        cores: int = 1,
        batched: bool = False,
        watts: float = 0.0,
        seed: tuple[int, ...] = (0,),
        place: Place | None = None,
        idle_watts: float = 0.0,
        dollars_per_hour: float = 0.0,
    ) -> None:
        super().__init__(
            name, servers=1 if batched else cores, batch=MOST if batched else 1, watts=watts,
            place=place, idle_watts=idle_watts, dollars_per_hour=dollars_per_hour,
        )  # fmt: skip
        self.tasks = dict(tasks)
        self._random = np.random.default_rng(seed)
        self._draws: list[float] = []

    def accepts(self, stage: Stage, model: str) -> bool:
        """It has the task."""
        return stage.kind in HOST_KINDS and not stage.model and stage.task in self.tasks

    def _task(self, request: Request) -> Task:
        return self.tasks[request.chain[request.position].task]

    def duration(self, requests: list[Request]) -> float:
        """The longest of the tasks of a step."""
        return max([self._seconds(request) for request in requests])

    def _seconds(self, request: Request) -> float:
        task = self._task(request)
        mean = task.seconds + task.per_prompt_token * request.prompt
        mean += task.per_output_token * request.total_emitted
        if task.law == "constant":
            return mean
        if not self._draws:
            self._draws = self._random.standard_exponential(4096).tolist()
        return mean * self._draws.pop()

    def apply(self, request: Request) -> None:
        """Cut the prompt, if the task does."""
        task = self._task(request)
        if task.truncate:
            request.prompt = min(request.prompt, task.truncate)
