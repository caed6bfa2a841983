"""Fitting the efficiencies of a dense cost to measured serving points.

A serving point is what a load generator reports of one server: so many users who each keep one
request in flight, with prompts and outputs of one length, and the mean time per output token. In
the steady state a user's neighbours each begin one request while its own tokens come out, so that

``time per token = decode + (users - 1) / output · (decode with a prompt - decode)``

where *decode* is a step of all users at their mean context. That closed form is differentiated
numerically and fitted by damped least squares (Levenberg, Marquardt) on relative errors; each
error of many per cent weighs less than its square, since tables of other people have outliers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxgraft.devices import Device
from fxgraft.errors import InputError
from fxgraft.runtime.hermes.coordinator import Coordinator
from fxgraft.runtime.hermes.dense import DenseCost, DenseModel, Efficiency, bytes_of
from fxgraft.runtime.hermes.llm.client import LlmClient
from fxgraft.runtime.hermes.llm.scheduler import Limits
from fxgraft.runtime.hermes.log import Array
from fxgraft.runtime.hermes.request import Request
from fxgraft.runtime.hermes.results.metrics import latencies
from fxgraft.runtime.hermes.stages import DECODE, PREFILL, Stage

MEMORY_SHARE = 0.9
"""Of the devices' memory, that weights and keys and values may fill."""
STEP_TOKENS = 8192
"""Token budget of a step: the default of the measured servers."""
_BLOCK = 16
_WAVES = 4
_CHAIN = (Stage(PREFILL), Stage(DECODE))
_STEP, _SLACK, _PULL, _MOST_DAMPING = 0.02, 0.05, 0.3, 1e6


@dataclass(frozen=True)
class ServingPoint:
    """One measurement of a server under a constant number of users.

    Attributes:
        model: sizes of the model.
        device: of each device.
        devices: over which the model is divided.
        weights, state: data types of weights, and of keys and values.
        users: requests in flight.
        prompt, output: tokens of each request.
        ttft, tpot: mean seconds to the first token, and per token after it.
    """

    model: DenseModel
    device: Device
    devices: int
    weights: str
    state: str
    users: int
    prompt: int
    output: int
    ttft: float
    tpot: float

    def __post_init__(self) -> None:
        for name in ("users", "prompt", "output", "tpot"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name!r} of a serving point is {value!r}", "give more than 0")

    def cost(self, efficiency: Efficiency) -> DenseCost:
        """Price of this server's steps."""
        return DenseCost(
            self.model, self.device, self.weights, self.state, devices=self.devices,
            efficiency=efficiency,
        )  # fmt: skip

    @property
    def blocks(self) -> int:
        """KV blocks of 16 tokens that the memory holds."""
        left = MEMORY_SHARE * self.devices * self.device.memory
        left -= self.model.parameters * bytes_of(self.weights)
        return max(int(left / self.model.kv_bytes(self.state) / _BLOCK), 0)

    @property
    def running(self) -> int:
        """Requests that run at once; the others of ``users`` wait for memory."""
        fit = self.blocks // -(-(self.prompt + self.output) // _BLOCK)
        return max(min(self.users, fit), 1)


@dataclass(frozen=True)
class Bounds:
    """What is known of a parameter before the fit.

    Attributes:
        start: where the search begins, and what points that say nothing leave it at.
        low, high: of its value.
        spread: standard deviation of its logarithm.
    """

    start: float
    low: float
    high: float
    spread: float


PARAMETERS = {
    "linear_compute": Bounds(0.6, 0.05, 1.0, 0.5),
    "linear_memory": Bounds(0.8, 0.05, 1.0, 0.3),
    "prefill_attention": Bounds(0.4, 0.02, 1.0, 0.7),
    "decode_attention": Bounds(0.6, 0.05, 1.0, 0.5),
    "elementwise": Bounds(0.6, 0.02, 1.0, 1.0),
    "communication": Bounds(0.5, 0.05, 1.0, 0.7),
    "latency": Bounds(0.1, 1e-3, 2.0, 1.5),
    "layer_seconds": Bounds(3e-6, 1e-9, 1.0, 1.5),
    "step_seconds": Bounds(5e-4, 1e-9, 1.0, 1.5),
    "sequence_seconds": Bounds(1e-5, 1e-9, 1.0, 1.5),
}
"""Of ``Efficiency``; one value of each holds for all models, devices and data types."""


@dataclass(frozen=True)
class Fitted:
    """The outcome of a fit.

    Attributes:
        efficiency: the fitted shares and times.
        points: that it was fitted to.
        error: mean absolute relative error of time per token over them.
    """

    efficiency: Efficiency
    points: int
    error: float


def steady_tpot(point: ServingPoint, cost: DenseCost) -> float:
    """Seconds per output token in the steady state; see the module's description."""
    users = point.running
    context = users * (point.prompt + point.output // 2)
    decode = cost.price((), users, context).seconds
    both = cost.price([(point.prompt, 0)], users, context).seconds
    return decode + (users - 1) / point.output * (both - decode)


def fit_efficiency(points: Sequence[ServingPoint]) -> Fitted:
    """Fit one efficiency per class of operator.

    Raises:
        InputError: there are no more points than parameters.
    """
    if len(points) <= len(PARAMETERS):
        raise InputError(
            f"{len(points)} points cannot fix {len(PARAMETERS)} parameters",
            "give more points",
        )
    bounds = list(PARAMETERS.values())
    start: Array = np.array([math.log(one.start) for one in bounds])
    low: Array = np.array([math.log(one.low) for one in bounds])
    high: Array = np.array([math.log(one.high) for one in bounds])
    pull: Array = np.array([_PULL / one.spread for one in bounds])
    place: Array = start
    errors, damping = _errors(points, start), 1e-2
    loss = _loss(errors, place - start, pull)
    while damping < _MOST_DAMPING:
        step = _descent(points, place, errors, pull * (place - start), pull, damping)
        moved: Array = np.clip(place + step, low, high)
        found = _errors(points, moved)
        gain = loss - _loss(found, moved - start, pull)
        damping *= 4.0 if gain <= 0.0 else 0.3
        if gain <= 0.0:
            continue
        place, errors, loss = moved, found, loss - gain
        if gain < 1e-4 * loss:
            break
    return Fitted(_efficiency(place), len(points), float(np.abs(np.expm1(errors)).mean()))


def _descent(
    points: Sequence[ServingPoint],
    place: Array,
    errors: Array,
    pulled: Array,
    pull: Array,
    damping: float,
) -> Array:
    """The damped step towards smaller weighted squares of errors and of distances from start."""
    weights = 1.0 / np.sqrt(np.abs(errors) + _SLACK)
    slopes = np.vstack([_slopes(points, place, errors) * weights[:, None], np.diag(pull)])
    rest = np.concatenate([errors * weights, pulled])
    normal = slopes.T @ slopes + damping * np.eye(len(place))
    return np.asarray(-np.linalg.solve(normal, slopes.T @ rest), np.float64)


def _efficiency(logarithms: Array) -> Efficiency:
    return Efficiency(**dict(zip(PARAMETERS, np.exp(logarithms).tolist(), strict=True)))


def _errors(points: Sequence[ServingPoint], logarithms: Array) -> Array:
    """Logarithms of predicted over measured time per token."""
    efficiency = _efficiency(logarithms)
    costs: dict[tuple[object, ...], DenseCost] = {}  # of alike servers, since costs remember work
    ratios: list[float] = []
    for point in points:
        server = point.model, point.device.name, point.devices, point.weights, point.state
        cost = costs.get(server) or costs.setdefault(server, point.cost(efficiency))
        ratios.append(steady_tpot(point, cost) / point.tpot)
    return np.array([math.log(ratio) for ratio in ratios])


def _slopes(points: Sequence[ServingPoint], place: Array, errors: Array) -> Array:
    """Derivatives of the errors by each parameter, [points, parameters]."""
    steps = np.eye(len(place)) * _STEP
    return np.stack([(_errors(points, place + step) - errors) / _STEP for step in steps], axis=1)


def _loss(errors: Array, moved: Array, pull: Array) -> float:
    """Errors count by their squares while they are small and by their size beyond."""
    size = np.abs(errors)
    robust = size - _SLACK * np.log1p(size / _SLACK)
    return float(robust.sum() + 0.5 * ((pull * moved) ** 2).sum())


def simulated(point: ServingPoint, efficiency: Efficiency) -> tuple[float, float]:
    """Mean seconds to the first token and per token after it, by a simulation of the server.

    Users begin one after the other, so that they do not stay in step with each other; their first
    and last requests are not counted.
    """
    cost = point.cost(efficiency)
    limits = Limits(
        "running_first", max_batched_tokens=STEP_TOKENS, max_sequences=STEP_TOKENS,
        blocks=point.blocks, block_size=_BLOCK,
    )  # fmt: skip
    coordinator = Coordinator(
        [LlmClient("server", model="", cost=cost, limits=limits)],
        _Users(point, point.output * steady_tpot(point, cost)),
        keep=frozenset({"requests"}),
    )
    coordinator.run()
    table = coordinator.requests.table()
    number = table["request"] // point.users
    counted = {name: column[(number > 0) & (number < _WAVES - 1)] for name, column in table.items()}
    found = latencies(counted)
    return float(found.ttft.mean()), float(np.nanmean(found.tpot))


class _Users:
    """Users who each send the next request when they have the answer to the last one.

    Args:
        point: their number and their requests.
        seconds: over which they begin.
    """

    def __init__(self, point: ServingPoint, seconds: float) -> None:
        self._point = point
        self._starts = iter(np.linspace(0.0, seconds, point.users, endpoint=False).tolist())
        self._number = 0

    def next(self) -> Request | None:
        """The first request of the next user."""
        start = next(self._starts, None)
        return None if start is None else self._request(start)

    def ended(self, request: Request, now: float) -> Request | None:
        """The next request of a user, until all together have sent enough."""
        return self._request(now) if self._number < _WAVES * self._point.users else None

    def _request(self, arrival: float) -> Request:
        self._number += 1
        point = self._point
        return Request(self._number - 1, arrival, point.prompt, point.output, _CHAIN)
