"""Max-min fair sharing of links and of storage bandwidth among what moves at one time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

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

    Attributes:
        rates: bytes per second by link.
    """

    def __init__(self, schedule: Callable[[float, Flow, int], None]) -> None:
        self.rates: dict[Link, float] = {}
        self._schedule = schedule
        self._flows: dict[Flow, None] = {}

    def start(
        self, links: Sequence[Link], size: float, now: float, done: Callable[[float], None]
    ) -> None:
        """Start moving ``size`` bytes over links whose rates are known."""
        self._flows[Flow(links, size, now, done)] = None
        self._share(now)

    def end(self, flow: Flow, now: float) -> None:
        """A flow has ended: the others go faster."""
        del self._flows[flow]
        self._share(now)
        flow.done(now)

    def _share(self, now: float) -> None:
        for flow, rate in fair_rates(list(self._flows), self.rates).items():
            if rate == flow.rate:
                continue
            flow.left = max(0.0, flow.left - flow.rate * (now - flow.since))
            flow.since, flow.rate = now, rate
            flow.epoch += 1
            self._schedule(now + flow.left / rate, flow, flow.epoch)


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
