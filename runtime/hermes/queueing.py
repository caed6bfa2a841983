"""Clients that serve a queue: several servers, or one server that takes all that waits at once."""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections import deque

from fxgraft.runtime.hermes.client import Client, Place
from fxgraft.runtime.hermes.request import RUNNING, WAITING, Request


class QueueClient(Client):
    """First come first served; a subclass says how long things take and what they change.

    Args:
        name, place, idle_watts, dollars_per_hour: see ``Client``.
        servers: steps that run at one time.
        batch: most requests of a step.
        watts: drawn by a server in a step.
    """

    def __init__(
        self,
        name: str,
        *,
        servers: int = 1,
        batch: int = 1,
        watts: float = 0.0,
        place: Place | None = None,
        idle_watts: float = 0.0,
        dollars_per_hour: float = 0.0,
    ) -> None:
        super().__init__(
            name, place=place, idle_watts=idle_watts, dollars_per_hour=dollars_per_hour
        )
        self.servers = servers
        self.batch = batch
        self.watts = watts
        self._queue: deque[Request] = deque()
        # Steps under way: end, number, start, requests, joules.
        self._running: list[tuple[float, int, float, list[Request], float]] = []
        self._number = 0
        self._served_seconds = 0.0

    @abstractmethod
    def duration(self, requests: list[Request]) -> float:
        """Seconds of a step; asked once per step, when it starts."""

    def joules(self, requests: list[Request], seconds: float) -> float:
        """Energy of a step; asked right after ``duration``."""
        return seconds * self.watts

    @abstractmethod
    def apply(self, request: Request) -> None:
        """What the stage changes in a request, when it ends."""

    def submit(self, request: Request, now: float) -> None:
        """A request joins the queue."""
        request.state = WAITING
        self._queue.append(request)
        if len(self._running) < self.servers:
            self.hub.schedule(self, now)

    def withdraw(self, request: Request, now: float) -> bool:
        """Take a request out of the queue."""
        if request not in self._queue:
            return False
        self._queue.remove(request)
        self.forget(request)
        return True

    def on_step(self, now: float, until: float) -> float | None:
        """Steps end, servers that are free take the next requests."""
        running = self._running
        while running and running[0][0] <= now:
            _, _, start, requests, joules = heapq.heappop(running)
            self._account(start, now, len(requests), 1, joules)
            for request in requests:
                self.apply(request)
                self.assigned -= 1
                self.served += 1
                self.hub.finish_stage(request, now)
        while self._queue and len(running) < self.servers:
            self._start(now)
        return running[0][0] if running else None

    def _start(self, now: float) -> None:
        queue = self._queue
        requests = [queue.popleft() for _ in range(min(self.batch, len(queue)))]
        for request in requests:
            request.state = RUNNING
            request.started = now
            request.queue_time += now - request.arrived
        self._number += 1
        seconds = self.duration(requests)
        joules = self.joules(requests, seconds)
        heapq.heappush(self._running, (now + seconds, self._number, now, requests, joules))

    def _account(self, start: float, end: float, requests: int, steps: int, joules: float) -> None:
        self._served_seconds += end - start
        row = (self.index, start, end, steps, end - start, 0, requests, 0, 0, 0)
        self.hub.steps.append((*row, len(self._queue), 0, joules, 0, 0))

    def stop(self, now: float) -> None:
        """Account for steps under way up to now."""
        for end, _, start, _, joules in self._running:
            share = (now - start) / (end - start) if end > start else 1.0
            self._account(start, now, 0, 0, joules * share)
        self._running.clear()

    def waiting_for(self) -> str:
        """The head of the queue."""
        if not self._queue:
            return ""
        return f"request {self._queue[0].index} heads a queue of {len(self._queue)}"

    def load(self, measure: str, now: float) -> float:
        """Requests, or predicted seconds from the mean time of those before."""
        if measure != "busy_seconds":
            return self.assigned
        left = sum(end - now for end, *_ in self._running)
        mean = self._served_seconds / self.served if self.served else 0.0
        return (left + mean * len(self._queue)) / self.servers
