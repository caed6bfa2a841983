"""Small systems for tests: a list of requests through clients that are made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fxgraft.runtime.hermes.client import Client
from fxgraft.runtime.hermes.coordinator import Coordinator
from fxgraft.runtime.hermes.costs import AffineCost, StepCost
from fxgraft.runtime.hermes.llm.client import LlmClient
from fxgraft.runtime.hermes.llm.scheduler import Limits
from fxgraft.runtime.hermes.request import Request
from fxgraft.runtime.hermes.stages import Chain, Stage

Table = dict[str, npt.NDArray[np.float64]]
PLAIN: Chain = (Stage("prefill"), Stage("decode"))
COST = AffineCost(base=10e-3, prefill_token=50e-6, sequence=0.5e-3, context=1e-6)


class ListSource:
    """Requests in the order of a list."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._pending = iter(sorted(requests, key=lambda r: (r.arrival, r.index)))

    def next(self) -> Request | None:
        """The next request."""
        return next(self._pending, None)

    def ended(self, request: Request, now: float) -> Request | None:
        """Nobody waits."""
        return None


def request(
    index: int, arrival: float, prompt: int, output: int = 1, chain: Chain = PLAIN, **fields: Any
) -> Request:
    """A request for the model ``m``."""
    return Request(index, arrival, prompt, output, chain, "m", **fields)


def llm(
    name: str = "llm", *, cost: StepCost = COST, stepwise: bool = False, role: Any = "both",
    options: dict[str, Any] | None = None, **limits: Any,
) -> LlmClient:  # fmt: skip
    """A client that serves the model ``m``."""
    return LlmClient(
        name, model="m", cost=cost, limits=Limits(**limits), role=role, stepwise=stepwise,
        **(options or {}),
    )  # fmt: skip


def run(
    requests: Sequence[Request],
    clients: Sequence[Client],
    *,
    horizon: float = math.inf,
    observer: Callable[[Coordinator], None] | None = None,
    **options: Any,
) -> Coordinator:
    """Simulate a list of requests."""
    coordinator = Coordinator(
        clients, ListSource(requests), horizon=horizon, observer=observer, **options
    )
    coordinator.run()
    return coordinator


def by_request(coordinator: Coordinator) -> Table:
    """The log of requests, sorted by their index."""
    table = coordinator.requests.table()
    order = np.argsort(table["request"], kind="stable")
    return {name: column[order] for name, column in table.items()}


def draw_requests(
    random: np.random.Generator,
    count: int,
    *,
    rate: float = 5.0,
    prompt: int = 400,
    output: int = 60,
    branches: bool = False,
) -> list[Request]:
    """Random requests; some with several branches, some of one token."""
    times = np.cumsum(random.exponential(1.0 / rate, count)).tolist()
    found: list[Request] = []
    for index, arrival in enumerate(times):
        one = request(
            index, arrival, int(random.integers(1, prompt)), int(random.integers(1, output))
        )
        if branches and random.random() < 0.3:
            plan = tuple(int(n) for n in random.integers(1, output, int(random.integers(2, 5))))
            one.plan = (plan,)
        found.append(one)
    return found
