"""The event queue: a total order of time, kind and sequence number."""

from __future__ import annotations

import heapq
from typing import Any

ARRIVAL, TIMEOUT, FLOW, CALL, STEP = 0, 1, 2, 3, 4
"""Kinds in the order in which they happen at one time: arrivals before steps."""

Event = tuple[float, int, int, Any, Any]
"""Time in seconds, kind, sequence number, and two fields that depend on the kind."""


class EventQueue:
    """Pending events; those of one time and kind come out in the order they were put in."""

    __slots__ = ("heap", "number")

    def __init__(self) -> None:
        self.heap: list[Event] = []
        self.number = 0

    def push(self, time: float, kind: int, subject: Any, detail: Any = None) -> None:
        """Add an event."""
        self.number += 1
        heapq.heappush(self.heap, (time, kind, self.number, subject, detail))

    def pop(self) -> Event:
        """Take out the earliest event."""
        return heapq.heappop(self.heap)
