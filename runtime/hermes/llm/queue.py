"""The queue of an LLM client: first come first served, or least work left."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import Literal

from fxgraft.runtime.hermes.request import Request

Order = Literal["fcfs", "least_work"]


class Queue:
    """Waiting requests; preempted ones stand before all others, in the order of admission.

    Attributes:
        size: number of waiting requests.
    """

    def __init__(self, order: Order = "fcfs") -> None:
        self.order = order
        self.size = 0
        self._front: list[Request] = []
        self._line: deque[Request] = deque()
        self._heap: list[tuple[int, float, int, Request]] = []

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Request]:
        yield from reversed(self._front)
        yield from self._line
        for _, _, _, request in sorted(self._heap, key=lambda entry: entry[:3]):
            yield request

    def push(self, request: Request) -> None:
        """A new request, behind the others or by its remaining prompt tokens."""
        self.size += 1
        if self.order == "fcfs":
            self._line.append(request)
        else:
            entry = (request.todo, request.arrived, request.index, request)
            heapq.heappush(self._heap, entry)

    def push_front(self, request: Request) -> None:
        """A preempted request."""
        self.size += 1
        self._front.append(request)

    def head(self) -> Request | None:
        """The next request, or None."""
        if self._front:
            return self._front[-1]
        if self._line:
            return self._line[0]
        return self._heap[0][3] if self._heap else None

    def pop(self) -> Request:
        """Take out the head."""
        self.size -= 1
        if self._front:
            return self._front.pop()
        if self._line:
            return self._line.popleft()
        return heapq.heappop(self._heap)[3]

    def remove(self, request: Request) -> bool:
        """Take out any waiting request that was not preempted; False if it is not there."""
        if request in self._line:
            self._line.remove(request)
            self.size -= 1
            return True
        for place, entry in enumerate(self._heap):
            if entry[3] is request:
                del self._heap[place]
                self.size -= 1
                heapq.heapify(self._heap)
                return True
        return False
