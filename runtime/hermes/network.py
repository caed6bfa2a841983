"""Links between clients, with or without sharing (spec section 5.2).

A transfer takes its path's latency plus bytes over bandwidth. With sharing, the transfers that are
under way at one time divide each link among them by max-min fairness, so a link is never idle
while a transfer could use it; without, each has the whole path for itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from fxgraft.runtime.hermes.client import Client
from fxgraft.runtime.hermes.log import Rows

FLOW_COLUMNS = ("request", "source", "target", "start", "end", "bytes")


@dataclass(frozen=True, slots=True)
class Level:
    """One kind of link: bytes per second in one direction, and seconds."""

    bandwidth: float
    latency: float = 0.0
    efficiency: float = 1.0

    @property
    def rate(self) -> float:
        """Bytes per second that arrive."""
        return self.bandwidth * self.efficiency


@dataclass(frozen=True, slots=True)
class Path:
    """Links from client to client: their names, and what they do together."""

    links: tuple[Hashable, ...]
    rate: float
    latency: float


@dataclass(slots=True, eq=False)
class Flow:
    """A transfer under way: bytes left as of ``since``."""

    subject: Any
    path: Path
    left: float
    since: float
    rate: float = 0.0
    epoch: int = 0


class Network:
    """Finds paths and times transfers.

    Args:
        inside_node, node_to_node, rack_to_rack: links by distance; None where there is none.
        direct: links between two named clients, before all others.
        shared: whether transfers at one time share links.
        schedule: called with (time, flow, epoch) when a shared transfer ends.
    """

    def __init__(
        self,
        inside_node: Level | None = None,
        node_to_node: Level | None = None,
        rack_to_rack: Level | None = None,
        *,
        direct: dict[tuple[str, str], Level] | None = None,
        shared: bool = False,
    ) -> None:
        self.inside_node = inside_node
        self.node_to_node = node_to_node
        self.rack_to_rack = rack_to_rack
        self.direct = direct or {}
        self.shared = shared
        self.schedule: Callable[[float, Flow, int], None] = _unscheduled
        self.rows = Rows(FLOW_COLUMNS)
        self.link_bytes: dict[Hashable, float] = {}
        self.link_rates: dict[Hashable, float] = {}
        self._flows: dict[Flow, None] = {}
        self._paths: dict[tuple[int, int], Path | None] = {}

    @property
    def is_free(self) -> bool:
        """Whether there are no links at all: transfers then take no time."""
        return not (self.direct or self.inside_node or self.node_to_node or self.rack_to_rack)

    def path(self, source: Client, target: Client) -> Path | None:
        """The path between two clients; None if they are not connected."""
        key = (source.index, target.index)
        if key not in self._paths:
            self._paths[key] = path = self._find(source, target)
            for link in path.links if path else ():
                self.link_rates[link] = max(
                    self.link_rates.get(link, 0.0), path.rate if path else 0
                )
        return self._paths[key]

    def _find(self, source: Client, target: Client) -> Path | None:
        direct = self.direct.get((source.name, target.name))
        if direct:
            return Path(((source.name, target.name),), direct.rate, direct.latency)
        if self.is_free or source is target:
            return Path((), math.inf, 0.0)
        here, there = source.place, target.place
        if here.node == there.node:
            return _path(self.inside_node, ("inside", here.node))
        if here.rack == there.rack:
            return _path(self.node_to_node, ("out", here.node), ("in", there.node))
        names = ("up", here.rack), ("down", there.rack)
        return _path(self.rack_to_rack, *names)

    def start(self, subject: Any, path: Path, size: float, now: float) -> Flow:
        """Start a shared transfer; ``schedule`` is told when it would end."""
        flow = Flow(subject, path, size, now)
        self._flows[flow] = None
        self._share(now)
        return flow

    def end(self, flow: Flow, now: float) -> None:
        """A shared transfer has ended: the others go faster."""
        del self._flows[flow]
        self._share(now)

    def log(self, row: tuple[float, ...], path: Path) -> None:
        """Record a transfer, columns ``FLOW_COLUMNS``."""
        for link in path.links:
            self.link_bytes[link] = self.link_bytes.get(link, 0.0) + row[-1]
        if self.rows.wanted:
            self.rows.append(row)

    def _share(self, now: float) -> None:
        """Give every flow its max-min fair rate and say when it ends."""
        rates = fair_rates(list(self._flows), self.link_rates)
        for flow, rate in rates.items():
            if rate == flow.rate:
                continue
            flow.left = max(0.0, flow.left - flow.rate * (now - flow.since))
            flow.since, flow.rate = now, rate
            flow.epoch += 1
            self.schedule(now + flow.left / rate, flow, flow.epoch)


def _path(level: Level | None, *links: Hashable) -> Path | None:
    return Path(links, level.rate, level.latency) if level else None


def _unscheduled(time: float, flow: Flow, epoch: int) -> None:
    raise AssertionError("a shared network without a queue")


def fair_rates(flows: list[Flow], capacity: dict[Hashable, float]) -> dict[Flow, float]:
    """Max-min fair rates by progressive filling.

    Links fill up one after another: the one with the least for each of its flows fixes the rate
    of those, and what they leave elsewhere is divided among the others.
    """
    rates: dict[Flow, float] = {}
    open_flows = dict.fromkeys(flows)
    left = {link: capacity[link] for flow in flows for link in flow.path.links}
    while open_flows:
        users: dict[Hashable, list[Flow]] = {}
        for flow in open_flows:
            for link in flow.path.links:
                users.setdefault(link, []).append(flow)
        if not users:
            rates.update(dict.fromkeys(open_flows, math.inf))
            break
        link = min(users, key=lambda name: left[name] / len(users[name]))
        share = left[link] / len(users[link])
        for flow in users[link]:
            rates[flow] = share
            del open_flows[flow]
            for other in flow.path.links:
                left[other] -= share
    return rates


def visible_bytes(size: float, rate: float, layers: int, overlap: float) -> float:
    """Bytes still to send when prefill ends, if each layer's KV leaves when it is computed.

    Args:
        size: all bytes.
        rate: bytes per second of the path.
        layers: of the model.
        overlap: seconds that the prefill took.
    """
    return max(size / layers, size - rate * overlap * (layers - 1) / layers)
