"""Links between clients, with or without sharing (spec section 5.2).

A transfer takes its path's latency plus bytes over bandwidth. With sharing, the transfers that are
under way at one time divide each link among them by max-min fairness, so a link is never idle
while a transfer could use it; without, each has the whole path for itself.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from fxgraft.runtime.hermes.client import Client
from fxgraft.runtime.hermes.log import Rows
from fxgraft.runtime.hermes.request import Request

FLOW_COLUMNS = ("request", "source", "target", "start", "end", "bytes")
Ends = tuple[Hashable, Hashable]
"""A link in one direction, by its two ends."""


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
    """Ends from client to client: their names, and what they do together."""

    links: tuple[Ends, ...]
    rate: float
    latency: float


class Network:
    """Finds paths and times transfers.

    Args:
        inside_node, node_to_node, rack_to_rack: links by distance; None where there is none. The
            latency of a level is that of the whole way.
        direct: links between two names, in both directions. A name is a client's or that of a
            switch; the way with the fewest links is taken, before all levels.
        shared: whether transfers at one time share links.

    Attributes:
        rows: log of transfers.
        link_bytes: carried, by link.
        link_rates: bytes per second, by link.
    """

    def __init__(
        self,
        inside_node: Level | None = None,
        node_to_node: Level | None = None,
        rack_to_rack: Level | None = None,
        *,
        direct: Mapping[tuple[str, str], Level] | None = None,
        shared: bool = False,
    ) -> None:
        self.inside_node = inside_node
        self.node_to_node = node_to_node
        self.rack_to_rack = rack_to_rack
        self.shared = shared
        self.rows = Rows(FLOW_COLUMNS)
        self.link_bytes: dict[Ends, float] = {}
        self.link_rates: dict[Ends, float] = {}
        self._direct: dict[str, dict[str, Level]] = {}
        for (a, b), level in (direct or {}).items():
            self._direct.setdefault(a, {})[b] = level
            self._direct.setdefault(b, {})[a] = level
        self._paths: dict[tuple[int, int], Path | None] = {}

    @property
    def is_free(self) -> bool:
        """Whether there are no links at all: transfers then take no time."""
        return not (self._direct or self.inside_node or self.node_to_node or self.rack_to_rack)

    def path(self, source: Client, target: Client) -> Path | None:
        """The path between two clients; None if they are not connected."""
        key = (source.index, target.index)
        if key not in self._paths:
            self._paths[key] = self._find(source, target)
        return self._paths[key]

    def _find(self, source: Client, target: Client) -> Path | None:
        if self.is_free or source is target:
            return Path((), math.inf, 0.0)
        names = self._fewest_links(source.name, target.name)
        if names:
            return self._joined(names)
        here, there = source.place, target.place
        if here.node == there.node:
            return self._level(self.inside_node, [(("node", here.node), ("node", here.node))])
        out, into = ("node", here.node), ("node", there.node)
        if here.rack == there.rack:
            fabric = ("rack", here.rack)
            return self._level(self.node_to_node, [(out, fabric), (fabric, into)])
        up, down = ("rack", here.rack), ("rack", there.rack)
        return self._level(self.rack_to_rack, [(up, "racks"), ("racks", down)])

    def _fewest_links(self, source: str, target: str) -> list[str]:
        """Names on the shortest way over direct links; empty if there is none."""
        before: dict[str, str] = {source: ""}
        pending = deque([source])
        while pending and target not in before:
            name = pending.popleft()
            for other in self._direct.get(name, {}):
                if other not in before:
                    before[other] = name
                    pending.append(other)
        if target not in before:
            return []
        names = [target]
        while names[-1] != source:
            names.append(before[names[-1]])
        return names[::-1]

    def _joined(self, names: list[str]) -> Path:
        """On a way of several links latencies add and the smallest bandwidth rules."""
        links = list(itertools.pairwise(names))
        levels = [self._direct[a][b] for a, b in links]
        for link, level in zip(links, levels, strict=True):
            self.link_rates[link] = level.rate
        return Path(tuple(links), min(x.rate for x in levels), sum(x.latency for x in levels))

    def _level(self, level: Level | None, links: list[Ends]) -> Path | None:
        if level is None:
            return None
        self.link_rates.update(dict.fromkeys(links, level.rate))
        return Path(tuple(links), level.rate, level.latency)

    def log(self, request: Request, path: Path, size: float, start: float, end: float) -> None:
        """Record a transfer, columns ``FLOW_COLUMNS``."""
        for link in path.links:
            self.link_bytes[link] = self.link_bytes.get(link, 0.0) + size
        source, target = request.previous, request.client
        if source and target:
            self.rows.append((request.index, source.index, target.index, start, end, size))
