"""What Prometheus reads, and the recent past that the status page and ``Retry-After`` need."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fxgraft.runtime.engine import EngineStats
from fxgraft.runtime.serve.worker import TokenStream

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAUGES = {
    "running": "Requests that get tokens",
    "prefilling": "Requests whose prompt is being read",
    "queued": "Requests that wait",
    "blocks_total": "Blocks of paged state",
    "blocks_used": "Blocks in use",
    "blocks_cached": "Blocks kept for reuse",
    "slots_total": "Slots of fixed state",
    "slots_used": "Slots in use",
    "step_seconds": "Seconds of the last step",
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens taken in",
    "generated_tokens": "Tokens generated",
    "reused_tokens": "Prompt tokens whose state was reused",
    "preemptions": "Requests that gave their blocks to others and began again",
    "steps": "Steps of the engine",
}
_WINDOW = 10.0
_KEPT = 256


class Metrics:
    """Measurements of one server, in a registry of its own.

    Args:
        stats: gives the engine's counts.
    """

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(stats))
        self.http = self._counter("http_requests", "Answers by path and status", "path", "status")
        self.finished = self._counter("requests", "Requests by how they ended", "reason")
        self._first = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token"
        )
        self._each = self._histogram(
            "time_per_output_token_seconds", "Between tokens, mean of a request"
        )
        self._queued = self._histogram("queue_seconds", "From arrival to the beginning of prefill")
        self._whole = self._histogram("request_seconds", "From arrival to the last token")
        self.recent_first: deque[float] = deque(maxlen=_KEPT)
        self.recent_each: deque[float] = deque(maxlen=_KEPT)

    def observe(self, stream: TokenStream) -> None:
        """Take in a request that ended."""
        self.finished.labels(reason=stream.finish_reason).inc()
        request = stream.request
        if request is not None and request.started:
            self._queued.observe(max(request.started - stream.arrived, 0))
        if not stream.first_token:
            return
        first = stream.first_token - stream.arrived
        self._first.observe(first)
        self.recent_first.append(first)
        self._whole.observe(stream.last_token - stream.arrived)
        if stream.received > 1:
            each = (stream.last_token - stream.first_token) / (stream.received - 1)
            self._each.observe(each)
            self.recent_each.append(each)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"fxgraft_{name}", meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str) -> Histogram:
        return Histogram(f"fxgraft_{name}", meaning, registry=self.registry, buckets=_SECONDS)


class _EngineCollector(Collector):
    """Reads the engine's counts when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._stats()
        for name, meaning in _GAUGES.items():
            yield GaugeMetricFamily(f"fxgraft_{name}", meaning, value=getattr(stats, name))
        for name, value in stats.policy.items():
            yield GaugeMetricFamily(f"fxgraft_{name}", "From the policy of layers", value=value)
        for name, meaning in _COUNTERS.items():
            yield CounterMetricFamily(f"fxgraft_{name}", meaning, value=getattr(stats, name))


class Throughput:
    """Tokens per second over the last ten seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[tuple[float, int]] = deque()

    def add(self, tokens: int) -> None:
        """Take in a step's tokens."""
        if tokens:
            self._steps.append((self._clock(), tokens))
        self._forget()

    @property
    def rate(self) -> float:
        """Tokens per second; 0 if there were none lately."""
        self._forget()
        if not self._steps:
            return 0.0
        # The first step's tokens were made before the window that they open.
        spanned = max(self._clock() - self._steps[0][0], 1e-3)
        later = sum(tokens for _, tokens in self._steps) - self._steps[0][1]
        return later / spanned

    def _forget(self) -> None:
        while self._steps and self._steps[0][0] < self._clock() - _WINDOW:
            self._steps.popleft()


def quantiles(values: Iterable[float]) -> dict[str, Any]:
    """Median and 99th percentile; None without values."""
    ordered = sorted(values)
    if not ordered:
        return {"p50": None, "p99": None}
    return {name: ordered[min(int(len(ordered) * share), len(ordered) - 1)]
            for name, share in (("p50", 0.5), ("p99", 0.99))}  # fmt: skip
