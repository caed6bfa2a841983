"""DSLA-Serve on a client: requests at levels, raised by the policy that the server itself has.

The client's blocks are counted by layer: a request at level k of a model of n layers holds n - k of
them for each ``block_size`` tokens. States are set aside when a server starts, as the engine does.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxgraft.cost_table import LevelPricer, Levels
from fxgraft.runtime.dsla_serve.policy import Memory, Rules, Running, Snapshot, decide, start_level
from fxgraft.runtime.hermes.costs import StepCost, WithWatts
from fxgraft.runtime.hermes.llm.blocks import blocks_for
from fxgraft.runtime.hermes.request import Request

if TYPE_CHECKING:
    from fxgraft.runtime.hermes.llm.scheduler import Scheduler

_ENDS = 16
"""Ends of requests that the predicted wait goes by, as in the engine."""


@dataclass(frozen=True)
class LevelRules:
    """How a client's requests change levels, and what it costs.

    Attributes:
        rules: of the policy.
        levels: of the model.
        pricer: of its steps.
        fold_seconds: of one token in one layer, when a running request is converted.
        watts: drawn in steps whose price has no energy.
    """

    rules: Rules
    levels: Levels
    pricer: LevelPricer
    fold_seconds: float
    watts: float = 0.0


class LevelPolicy:
    """Decides before steps, as ``fxgraft.runtime.dsla_serve.live`` does in the engine.

    Args:
        of: rules and prices.
        scheduler: of the client.

    Attributes:
        memory: what the last decision left.
        conversions: of one layer of one request, so far.
        folding: seconds of folding before the present step.
    """

    def __init__(self, of: LevelRules, scheduler: Scheduler) -> None:
        self._of = of
        self._scheduler = scheduler
        self.memory = Memory()
        self.conversions = 0
        self.folding = 0.0
        self._ends: deque[float] = deque(maxlen=_ENDS)

    def start(self, request: Request) -> None:
        """The level of a request that waits; one that was preempted keeps its own."""
        levels = self._of.levels
        request.level = start_level(
            self._of.rules, self.memory, request.prompt, levels.layers, levels.offered
        )
        request.kv_layers = levels.layers - request.level

    def ended(self, request: Request, now: float) -> None:
        """A request leaves the client."""
        self._ends.append(now)
        request.kv_layers = 1

    def decide(self) -> None:
        """Convert running requests as the policy says; their blocks are free at once."""
        scheduler = self._scheduler
        if not scheduler.decodes.count:
            return
        snapshot = self.snapshot()
        decision = decide(self._of.rules, snapshot, self.memory)
        self.memory = decision.memory
        if not decision.raised:
            return
        tokens = {one.id: one.tokens for one in snapshot.running}
        running = {name_of(request): request for request in scheduler.running}
        for name, level in decision.raised:
            request = running[name]
            request.level = level
            layers = snapshot.layers - level
            scheduler.pool.give(scheduler.decodes.keep_layers(request, layers))
            self.conversions += 1
            self.folding += tokens[name] * self._of.fold_seconds

    def snapshot(self) -> Snapshot:
        """What the policy sees of the client."""
        scheduler = self._scheduler
        size, decodes = scheduler.limits.block_size, scheduler.decodes
        ends = self._ends
        interval = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else 0.0
        promised = sum(_most_blocks(request, size) for request in scheduler.running)
        return Snapshot(
            time=scheduler.now,
            pressure=promised / scheduler.pool.capacity,
            predicted_wait=scheduler.queue.size * interval,
            running=tuple(
                Running(
                    name_of(request), request.prompt,
                    request.prompt + decodes.emitted_by(request) - 1, request.level,
                )
                for request in scheduler.running if not request.todo
            ),
            layers=self._of.levels.layers,
            offered=self._of.levels.offered,
            fold_seconds_per_token=self._of.fold_seconds,
        )  # fmt: skip

    @property
    def next_change(self) -> float | None:
        """When a decision may differ although nothing happens: a time, None for never.

        While levels rise that is at once; else when pressure was low for long enough.
        """
        memory = self.memory
        if memory.rising:
            return 0.0
        if memory.calm_since is None or memory.level == 0:
            return None
        return memory.calm_since + self._of.rules.calm_seconds

    def cost(self) -> StepCost:
        """Prices of the step that was planned, by the levels of its requests."""
        scheduler = self._scheduler
        rows = keys = 0
        if scheduler.with_decodes:
            emitted_by = scheduler.decodes.emitted_by
            for request in scheduler.running:
                if request.level and not request.todo:
                    weight = request.level * request.live
                    rows += weight
                    keys += weight * (request.prompt + emitted_by(request))
        found = self._of.pricer.mixed([r.level for r, _, _ in scheduler.chunks], rows, keys)
        return WithWatts(found, self._of.watts) if self._of.watts else found

    def take_folding(self) -> float:
        """Seconds of folding since the last call."""
        seconds, self.folding = self.folding, 0.0
        return seconds


def name_of(request: Request) -> str:
    """As the engine names them."""
    return f"request-{request.index}"


def _most_blocks(request: Request, size: int) -> int:
    """Blocks that a request holds when it has all its tokens."""
    if not request.branch_outputs:
        output = request.output if request.decodes else 0
        return blocks_for(request.prompt + output, size) * request.kv_layers
    own = sum(blocks_for(output, size) for output in request.branch_outputs)
    return (blocks_for(request.prompt, size) + own) * request.kv_layers
