"""Max-min fair sharing of links and of storage bandwidth among what moves at one time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

Link = Hashable
"""Anything with a bandwidth: a link in one direction, one level of a storage hierarchy."""


@dataclass(slots=True, eq=False)
class Flow:
    """Bytes on their way: those left as of ``since``.

    Attributes:
        links: that it uses all at once.
        left: bytes.
        since: when ``left`` was true, in seconds.
        done: called with the time at which the last byte left.
        rate: bytes per second since then.
        epoch: number of the valid event; older ones are stale.
    """

    links: Sequence[Link]
    left: float
    since: float
    done: Callable[[float], None]
    rate: float = 0.0
    epoch: int = 0


class FairShare:
    """All flows of a system; no link is idle while a flow could use it.

    Args:
        schedule: called with (time, flow, epoch): ``end`` is due then, if the epoch still holds.
    """

    def __init__(self, schedule: Callable[[float, Flow, int], None]) -> None:
        self._schedule = schedule
        self._rates: dict[Link, float] = {}
        self._users: dict[Link, dict[Flow, None]] = {}
        self._alone: dict[Link, _Alone] = {}

    def add(self, link: Link, rate: float, *, alone: bool = False) -> None:
        """Make a link known.

        Args:
            link: it.
            rate: its bytes per second.
            alone: whether its flows use no other link; thousands of them then cost little.
        """
        if alone:
            self._alone.setdefault(link, _Alone(rate, self._schedule))
        else:
            self._rates[link] = rate

    def start(
        self, links: Sequence[Link], size: float, now: float, done: Callable[[float], None]
    ) -> None:
        """Start moving ``size`` bytes over links that are known."""
        flow = Flow(links, size, now, done)
        alone = self._alone.get(links[0])
        if alone is not None:
            alone.start(flow, now)
            return
        for link in links:
            self._users.setdefault(link, {})[flow] = None
        self._share(links, now)

    def end(self, flow: Flow, now: float) -> None:
        """A flow has ended: the others go faster."""
        alone = self._alone.get(flow.links[0])
        if alone is not None:
            alone.end(flow, now)
        else:
            for link in flow.links:
                del self._users[link][flow]
            self._share(flow.links, now)
        flow.done(now)

    def _share(self, links: Sequence[Link], now: float) -> None:
        """Divide the bandwidths anew among all flows that links connect to these."""
        for flow, rate in fair_rates(self._connected(links), self._rates).items():
            if rate == flow.rate:
                continue
            flow.left = max(0.0, flow.left - flow.rate * (now - flow.since))
            flow.since, flow.rate = now, rate
            flow.epoch += 1
            self._schedule(now + flow.left / rate, flow, flow.epoch)

    def _connected(self, links: Sequence[Link]) -> list[Flow]:
        found: dict[Flow, None] = {}
        pending, seen = list(links), set(links)
        while pending:
            for flow in self._users[pending.pop()]:
                if flow not in found:
                    found[flow] = None
                    pending += [link for link in flow.links if link not in seen]
                    seen.update(flow.links)
        return list(found)


class _Alone:
    """One link whose flows use no other: all have the same rate, so that their order is fixed.

    What a flow has got since the link was first used is the same for all flows; a flow ends when
    that has grown by its size. A change costs the logarithm of the number of flows.
    """

    def __init__(self, rate: float, schedule: Callable[[float, Flow, int], None]) -> None:
        self._rate, self._schedule = rate, schedule
        self._given, self._since, self._number = 0.0, 0.0, 0
        self._heap: list[tuple[float, int, Flow]] = []

    def start(self, flow: Flow, now: float) -> None:
        """One more flow; ``left`` stays its size."""
        self._advance(now)
        before = self._heap[0][2] if self._heap else None
        self._number += 1
        heappush(self._heap, (self._given + flow.left, self._number, flow))
        self._schedule_first(before, now)

    def end(self, flow: Flow, now: float) -> None:
        """The first flow has its bytes."""
        self._advance(now)
        self._given, _, _ = heappop(self._heap)
        if self._heap:
            self._schedule_first(flow, now)

    def _advance(self, now: float) -> None:
        if self._heap:
            self._given += self._rate * (now - self._since) / len(self._heap)
        self._since = now

    def _schedule_first(self, before: Flow | None, now: float) -> None:
        due, _, first = self._heap[0]
        if before is not None:
            before.epoch += 1  # what was scheduled for it does not count
        first.epoch += 1
        left = max(due - self._given, 0.0) * len(self._heap)
        self._schedule(now + left / self._rate, first, first.epoch)


def fair_rates(flows: Sequence[Flow], capacity: Mapping[Link, float]) -> dict[Flow, float]:
    """Max-min fair rates by progressive filling.

    Links fill up one after another: the one with the least for each of its flows fixes the rate
    of those, and what they leave elsewhere is divided among the others.

    Args:
        flows: each with at least one link.
        capacity: bytes per second by link.
    """
    rates: dict[Flow, float] = {}
    left = {link: capacity[link] for flow in flows for link in flow.links}
    users: dict[Link, dict[Flow, None]] = {}
    for flow in flows:
        for link in flow.links:
            users.setdefault(link, {})[flow] = None
    while users:
        link = min(users, key=lambda name: left[name] / len(users[name]))
        share = left[link] / len(users[link])
        for flow in list(users[link]):
            rates[flow] = share
            for other in flow.links:
                left[other] = max(left[other] - share, 0.0)
                del users[other][flow]
                if not users[other]:
                    del users[other]
    return rates
