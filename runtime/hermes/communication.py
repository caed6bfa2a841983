"""Time of collectives inside a client (GenZ, arXiv 2406.01698; spec section 5.2).

``devices`` devices, ``size`` bytes per device, ``bandwidth`` bytes per second and ``latency``
seconds of a link; nothing moves for one device or no bytes.
"""

from __future__ import annotations

START = 5e-6
"""Seconds that a collective takes to start."""


def all_reduce(devices: int, size: float, bandwidth: float, latency: float = 0.0) -> float:
    """Seconds of a ring all-reduce."""
    if devices == 1 or size == 0:
        return 0.0
    share = 2 * (devices - 1)
    return START + share * latency + share / devices * size / bandwidth


def all_gather(devices: int, size: float, bandwidth: float, latency: float = 0.0) -> float:
    """Seconds of a ring all-gather; an all-to-all takes as long."""
    if devices == 1 or size == 0:
        return 0.0
    return START + (devices - 1) * latency + (devices - 1) / devices * size / bandwidth


def point_to_point(size: float, bandwidth: float, latency: float = 0.0) -> float:
    """Seconds of one message."""
    return latency + size / bandwidth if size else 0.0
