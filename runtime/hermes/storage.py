"""Storage clients: prior context is looked up instead of computed (spec section 6.3)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Literal

import numpy as np

from fxgraft.runtime.hermes.client import Hub, Place
from fxgraft.runtime.hermes.costs import StepCost
from fxgraft.runtime.hermes.hierarchy import (
    StorageLevel,
    Store,
    draw_level,
    expected_seconds,
    probe_seconds,
)
from fxgraft.runtime.hermes.queueing import QueueClient
from fxgraft.runtime.hermes.request import RUNNING, Request
from fxgraft.runtime.hermes.stages import KV_RETRIEVAL, Stage

Mode = Literal["expectation", "sampled", "contents"]
Sharing = Literal["own"] | bool


class StorageClient(QueueClient):
    """A hierarchy of stores.

    In the mode *expectation* every lookup takes the expected time: for means only. In *sampled*
    each draws where it hits; in *contents* it looks its key up in stores of finite capacity. What
    a level missed is in it when the lookup has ended, and the least recently used contexts leave.

    Args:
        name, place, idle_watts, dollars_per_hour: see ``Client``.
        levels: first to last.
        stores: one per level, maybe shared with other clients; for contents.
        mode: see above.
        kv_bytes: per token.
        recompute: price of computing a context here; None leaves a missed one to the prefill.
        charge_probes: whether a miss costs the level's lookup latency.
        sharing: lookups run at once and share each level's bandwidth, or with ``"own"`` each has
            all of it, as published; otherwise all that wait run in one step, in which each level
            moves its bytes one after another.
        links: a name for the bandwidth of each level, equal for clients that share it.
        seed: of draws.
        watts: drawn in a step.
    """

    kind = "storage"

    def __init__(
        self,
        name: str,
        *,
        levels: Sequence[StorageLevel],
        stores: Sequence[Store] = (),
        mode: Mode = "contents",
        kv_bytes: float,
        recompute: StepCost | None = None,
        charge_probes: bool = False,
        sharing: Sharing = False,
        links: Sequence[Hashable] = (),
        batch: int = 1 << 30,
        seed: tuple[int, ...] = (0,),
        watts: float = 0.0,
        place: Place | None = None,
        idle_watts: float = 0.0,
        dollars_per_hour: float = 0.0,
    ) -> None:
        super().__init__(
            name, batch=batch, watts=watts, place=place, idle_watts=idle_watts,
            dollars_per_hour=dollars_per_hour,
        )  # fmt: skip
        self.levels = list(levels)
        self.stores = list(stores) or [Store(level.capacity) for level in levels]
        self.mode: Mode = mode
        self.context_bytes = kv_bytes
        self.recompute = recompute
        self.charge_probes = charge_probes
        self.sharing = sharing
        self._links = list(links) or [(name, number) for number in range(len(self.levels))]
        self._random = np.random.default_rng(seed)
        # Keys, sizes and levels of the lookups under way.
        self._found: dict[Request, tuple[int, float, int]] = {}
        self._moving = 0
        self._busy_since = 0.0
        self.hits = [0] * (len(self.levels) + 1)

    def attach(self, index: int, hub: Hub) -> None:
        """Join a system and its shared bandwidths."""
        super().attach(index, hub)
        for link, level in zip(self._links, self.levels, strict=True):
            hub.share.add(link, level.bandwidth, alone=True)

    def accepts(self, stage: Stage, model: str) -> bool:
        """It has contexts of every model."""
        return stage.kind == KV_RETRIEVAL

    def submit(self, request: Request, now: float) -> None:
        """A lookup starts at once if bandwidth is shared, or joins the queue."""
        if self.sharing:
            self._start_alone(request, now)
        else:
            super().submit(request, now)

    # -- where a context is

    def _find(self, request: Request) -> int:
        """The level that has a request's context; the number of levels if none has."""
        tokens, levels = context_of(request), self.levels
        if self.mode == "sampled":
            return draw_level(levels, self._random)
        size, key = tokens * self.context_bytes, request.key
        if key < 0:
            return len(levels)
        found = next((i for i, store in enumerate(self.stores) if store.has(key, size)), None)
        place = len(levels) if found is None else found
        self._found[request] = key, size, place
        return place

    def _recompute_seconds(self, tokens: int) -> float:
        return self.recompute.price([(tokens, 0)]).seconds if self.recompute and tokens else 0.0

    def apply(self, request: Request) -> None:
        """The context becomes part of the prompt, and stays in the levels that missed it."""
        request.prompt += context_of(request)
        key, size, place = self._found.pop(request, (-1, 0.0, 0))
        for store in self.stores[:place]:
            store.put(key, size)

    # -- one step for all that wait

    def duration(self, requests: list[Request]) -> float:
        """Until the last lookup of the step has its bytes."""
        seconds = [0.0] * len(self.levels)
        slowest = 0.0
        for request in requests:
            tokens = context_of(request)
            size = tokens * self.context_bytes
            if self.mode == "expectation":
                again = self._recompute_seconds(tokens)
                request.loaded += tokens
                slowest = max(slowest, expected_seconds(
                    self.levels, size, again, charge_probes=self.charge_probes))  # fmt: skip
                continue
            found, latency = self._look_up(request)
            if found < len(self.levels):
                seconds[found] += size / self.levels[found].bandwidth
                latency += seconds[found]
            slowest = max(slowest, latency)
        return slowest

    def _look_up(self, request: Request) -> tuple[int, float]:
        """The level of a hit, and the seconds it takes but for moving the bytes."""
        found = self._find(request)
        self.hits[found] += 1
        seconds = probe_seconds(self.levels, found, charge_probes=self.charge_probes)
        if found < len(self.levels) or self.recompute is not None:
            request.loaded += context_of(request)
        if found == len(self.levels):
            seconds += self._recompute_seconds(context_of(request))
        return found, seconds

    # -- lookups at once

    def _start_alone(self, request: Request, now: float) -> None:
        request.state = RUNNING
        request.started = now
        found, seconds = self._look_up(request)
        if self._moving == 0:
            self._busy_since = now
        self._moving += 1
        self.hub.call(now + seconds, partial(self._move, request, found))

    def _move(self, request: Request, found: int, now: float) -> None:
        """The lookup is done: move the bytes, if there are any."""
        size = context_of(request) * self.context_bytes
        if found == len(self.levels) or size == 0:
            self._end_alone(request, now)
            return
        if self.sharing == "own":
            end = now + size / self.levels[found].bandwidth
            self.hub.call(end, partial(self._end_alone, request))
            return
        self.hub.share.start((self._links[found],), size, now, partial(self._end_alone, request))

    def _end_alone(self, request: Request, now: float) -> None:
        self._moving -= 1
        if self._moving == 0:
            self._account_moves(now, 1)
        self.apply(request)
        self.assigned -= 1
        self.served += 1
        self.hub.finish_stage(request, now)

    def stop(self, now: float) -> None:
        """Account for steps and lookups under way up to now."""
        super().stop(now)
        if self._moving:
            self._account_moves(now, 0)

    def _account_moves(self, now: float, number: int) -> None:
        """Log the time during which lookups were under way."""
        joules = (now - self._busy_since) * self.watts
        self._account(self._busy_since, now, number, number, joules)


def context_of(request: Request) -> int:
    """Tokens of prior context that the present stage asks for."""
    return request.chain[request.position].context_tokens or request.context
