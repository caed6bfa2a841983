"""Routers: which client runs the next stage (spec section 5.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from fxgraft.errors import Error
from fxgraft.runtime.hermes.client import Client
from fxgraft.runtime.hermes.request import Request

Measure = Literal[
    "requests", "prompt_tokens", "decodes", "tokens", "kv_tokens", "output_tokens", "busy_seconds"
]
"""Loads: requests given; prompt tokens to compute; sequences decoding; prompt tokens plus one per
request; tokens whose KV is held or promised; output tokens to come, as an oracle knows them;
seconds until all is done at the present pace."""
Policy = Literal["round_robin", "load", "heavy_light", "affinity"]
Router = Callable[[str, Request, Sequence[Client], float], Client]
"""Chooses among the candidates, given the stage's kind, the request and the time."""

HEAVY_PROMPT, HEAVY_OUTPUT = 2048, 512
"""Published thresholds: a request above either of them is heavy."""


class RoundRobin:
    """The candidate that was chosen longest ago.

    A request with preferred clients takes the first of them; with ``prefer_near`` the node of the
    stage before goes first.
    """

    def __init__(self, *, prefer_near: bool = False) -> None:
        self.prefer_near = prefer_near
        self._last: dict[int, int] = {}
        self._turn = 0

    def __call__(
        self, kind: str, request: Request, candidates: Sequence[Client], now: float
    ) -> Client:
        """Choose."""
        if request.preferred:
            found = preferred(request, candidates)
            if found:
                return found[0]
        if self.prefer_near:
            candidates = near(request, candidates)
        last = self._last
        chosen = min(candidates, key=lambda client: (last.get(client.index, -1), client.index))
        self._turn += 1
        last[chosen.index] = self._turn
        return chosen


class LeastLoad:
    """The candidate with the least load, preferred ones only if there are any; ties go to the
    lowest index."""

    def __init__(self, measure: Measure = "requests", *, prefer_near: bool = False) -> None:
        self.measure = measure
        self.prefer_near = prefer_near

    def __call__(
        self, kind: str, request: Request, candidates: Sequence[Client], now: float
    ) -> Client:
        """Choose."""
        if request.preferred:
            candidates = preferred(request, candidates) or candidates
        if self.prefer_near:
            candidates = near(request, candidates)
        return min(candidates, key=lambda c: (c.load(self.measure, now), c.index))


class HeavyLight:
    """One half of the candidates serves heavy requests, the other light ones, each by turns."""

    def __init__(self, prompt: int = HEAVY_PROMPT, output: int = HEAVY_OUTPUT) -> None:
        self.prompt, self.output = prompt, output
        self._robins = (RoundRobin(), RoundRobin())

    def __call__(
        self, kind: str, request: Request, candidates: Sequence[Client], now: float
    ) -> Client:
        """Choose; a single candidate serves both classes."""
        heavy = request.prompt > self.prompt or request.output > self.output
        half = max(len(candidates) // 2, 1)
        chosen = candidates[:half] if heavy else candidates[half:] or candidates
        return self._robins[heavy](kind, request, chosen, now)


class Affinity:
    """The same candidate for the same key of prior context."""

    def __call__(
        self, kind: str, request: Request, candidates: Sequence[Client], now: float
    ) -> Client:
        """Choose."""
        key = request.key if request.key >= 0 else request.index
        return candidates[key % len(candidates)]


def preferred(request: Request, candidates: Sequence[Client]) -> list[Client]:
    """The candidates that a request prefers, in its order."""
    by_name = {client.name: client for client in candidates}
    return [by_name[name] for name in request.preferred if name in by_name]


def in_node(node: int, candidates: Sequence[Client]) -> list[Client]:
    """The candidates on a node."""
    return [client for client in candidates if client.place.node == node]


def near(request: Request, candidates: Sequence[Client]) -> Sequence[Client]:
    """The candidates on the node of the previous stage's client, or all if there is none."""
    previous = request.previous
    return (in_node(previous.place.node, candidates) if previous else []) or candidates


def checked(router: Router, kind: str, request: Request, candidates: Sequence[Client],
            now: float) -> Client:  # fmt: skip
    """Ask a router, and hold it to its candidates.

    Raises:
        Error: it chose another client.
    """
    chosen = router(kind, request, candidates, now)
    if chosen not in candidates:
        names = ", ".join(client.name for client in candidates)
        raise Error(
            f"the router of stage {kind!r} chose {getattr(chosen, 'name', chosen)!r} for request "
            f"{request.index}, which is no candidate",
            f"return one of: {names}",
        )
    return chosen
