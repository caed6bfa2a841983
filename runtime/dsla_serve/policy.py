"""Which requests are converted further, and how far new ones are: a pure function of a snapshot.

A request's level is how many layers, from the front of the order, are linear for it. Levels of
running requests only rise. Source: arXiv 2506.09316, section 3.4, with hysteresis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

from pydantic import Field, model_validator

from fxgraft.settings import Settings


class Rules(Settings):
    """When levels rise and fall, and how far."""

    name: ClassVar[str] = "dsla"
    role: ClassVar[str] = "section"

    high: float = Field(default=0.90, gt=0)
    """Levels rise while more than this share of the blocks is in use or promised."""
    low: float = Field(default=0.75, gt=0)
    """They stop rising below this share."""
    calm: float = Field(default=0.60, ge=0)
    """New requests start lower after `calm_seconds` below this share."""
    calm_seconds: float = Field(default=30.0, ge=0)
    """Seconds of calm for each level that new requests start lower."""
    longest_wait: float = Field(default=10.0, gt=0)
    """Seconds; levels also rise while requests that wait are predicted to wait longer."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Share of the layers that are linear for every new request."""
    hard_ceiling: float = Field(default=0.75, ge=0, le=1)
    """Share of the layers that are linear at most; quality falls beyond."""
    ceilings: tuple[tuple[int, float], ...] = (
        (0, 0.125),
        (2048, 0.25),
        (4096, 0.375),
        (8192, 0.5),
    )
    """By least number of prompt tokens, the share of the layers that are linear at most."""
    fold_seconds: float = Field(default=1e-3, gt=0)
    """Seconds per step for folding; one request is converted in any case."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.calm <= self.low <= self.high:
            raise ValueError(f"needs calm <= low <= high, not {self.calm}, {self.low}, {self.high}")
        starts = [tokens for tokens, _ in self.ceilings]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise ValueError(f"needs ceilings that begin at 0 tokens and rise, not at {starts}")
        if not all(0 <= share <= 1 for _, share in self.ceilings):
            raise ValueError("needs ceilings from 0 to 1")
        return self

    def bucket(self, prompt: int) -> int:
        """The last ceiling that applies to a prompt of so many tokens."""
        return max(number for number, (least, _) in enumerate(self.ceilings) if prompt >= least)


@dataclass(frozen=True)
class Running:
    """A running request: its prompt's tokens, all its tokens, and its level."""

    id: str
    prompt: int
    tokens: int
    level: int


@dataclass(frozen=True)
class Snapshot:
    """What a decision depends on.

    Attributes:
        time: in seconds.
        pressure: share of the blocks that is in use, or promised to requests that were let in.
        predicted_wait: seconds that the last request in the queue is going to wait.
        running: requests that generate.
        layers: layers of the model.
        offered: layers that can be converted, at most ``layers``.
        fold_seconds_per_token: of one layer.
    """

    time: float
    pressure: float
    predicted_wait: float
    running: tuple[Running, ...]
    layers: int
    offered: int
    fold_seconds_per_token: float


@dataclass(frozen=True)
class Memory:
    """What a decision leaves for the next one.

    Attributes:
        level: with which new requests start, up to their ceiling.
        rising: whether levels were rising.
        calm_since: since when pressure is low, None if it is not.
    """

    level: int = 0
    rising: bool = False
    calm_since: float | None = None


@dataclass(frozen=True)
class Decision:
    """Requests with their new levels, and what is remembered."""

    raised: tuple[tuple[str, int], ...]
    memory: Memory


def start_level(rules: Rules, memory: Memory, prompt: int, layers: int, offered: int) -> int:
    """The level of a new request.

    Args:
        rules: the policy's.
        memory: of the last decision.
        prompt: tokens of its prompt.
        layers: of the model.
        offered: that can be converted.
    """
    floor = min(math.floor(rules.floor * layers), offered)
    return max(floor, min(memory.level, ceiling(rules, prompt, layers, offered)))


def ceiling(rules: Rules, prompt: int, layers: int, offered: int) -> int:
    """The highest level of a request with so many prompt tokens."""
    share = min(rules.ceilings[rules.bucket(prompt)][1], rules.hard_ceiling)
    return min(math.floor(share * layers), offered)


def decide(rules: Rules, snapshot: Snapshot, memory: Memory) -> Decision:
    """What to do before the next step."""
    waits = snapshot.predicted_wait > rules.longest_wait
    rising = waits or snapshot.pressure > rules.high
    rising = rising or (memory.rising and snapshot.pressure >= rules.low)
    if not rising:
        return Decision((), _relaxed(rules, snapshot, memory))
    raised = _raised(rules, snapshot)
    most = min(math.floor(rules.hard_ceiling * snapshot.layers), snapshot.offered)
    # Where nobody who runs can be converted further, those who come start higher.
    wanted = max((level for _, level in raised), default=memory.level + 1)
    level = max(memory.level, min(wanted, most))
    return Decision(raised, Memory(level, rising=True))


def _raised(rules: Rules, snapshot: Snapshot) -> tuple[tuple[str, int], ...]:
    """One more layer for the longest requests of the largest bucket first, as time allows."""
    able = [
        request
        for request in snapshot.running
        if request.level < ceiling(rules, request.prompt, snapshot.layers, snapshot.offered)
    ]
    able.sort(key=lambda r: (-rules.bucket(r.prompt), -r.tokens, r.id))
    chosen: list[tuple[str, int]] = []
    seconds = 0.0
    for request in able:
        seconds += request.tokens * snapshot.fold_seconds_per_token
        if chosen and seconds > rules.fold_seconds:
            break
        chosen.append((request.id, request.level + 1))
    return tuple(chosen)


def _relaxed(rules: Rules, snapshot: Snapshot, memory: Memory) -> Memory:
    if snapshot.pressure >= rules.calm:
        return Memory(memory.level)
    since = snapshot.time if memory.calm_since is None else memory.calm_since
    if snapshot.time - since < rules.calm_seconds or memory.level == 0:
        return Memory(memory.level, calm_since=since)
    return Memory(memory.level - 1, calm_since=snapshot.time)
