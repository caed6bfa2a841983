"""When requests arrive. Rates are per second, times in seconds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field

from fxgraft.runtime.hermes.section import (
    File,
    Number,
    Positive,
    Rate,
    Section,
    default_kind,
    tagged,
)

Times = npt.NDArray[np.float64]
BLOCK = 4096


class _Gaps(Section, ABC):
    """Arrivals with independent gaps."""

    rate: Rate

    def blocks(self, random: np.random.Generator) -> Iterator[Times]:
        """Increasing times, without end, in blocks."""
        now = 0.0
        while True:
            times = now + np.cumsum(self.gaps(random, BLOCK))
            now = float(times[-1])
            yield times

    @abstractmethod
    def gaps(self, random: np.random.Generator, count: int) -> Times:
        """Seconds between arrivals."""


class Regular(_Gaps):
    """Equal gaps."""

    kind: Literal["regular"] = "regular"

    def gaps(self, random: np.random.Generator, count: int) -> Times:
        """One over the rate."""
        return np.full(count, 1.0 / self.rate)


class Poisson(_Gaps):
    """Exponential gaps."""

    kind: Literal["poisson"] = "poisson"

    def gaps(self, random: np.random.Generator, count: int) -> Times:
        """Exponential draws."""
        return random.exponential(1.0 / self.rate, count)


class Gamma(_Gaps):
    """Gamma gaps with a coefficient of variation: above 1 burstier than Poisson, below 1 calmer."""

    kind: Literal["gamma"] = "gamma"
    variation: Rate

    def gaps(self, random: np.random.Generator, count: int) -> Times:
        """Gamma draws."""
        shape = self.variation**-2
        return random.gamma(shape, 1.0 / (self.rate * shape), count)


class NormalGaps(_Gaps):
    """Normal gaps, those below 0 made 0."""

    kind: Literal["normal"] = "normal"
    deviation: Number = 0.25

    def gaps(self, random: np.random.Generator, count: int) -> Times:
        """Normal draws."""
        mean = 1.0 / self.rate
        return np.maximum(random.normal(mean, self.deviation * mean, count), 0.0)


class Bursty(Section):
    """Poisson at a rate that swings: ``rate · (1 + (factor - 1) · sin(π t / period) ** power)``."""

    kind: Literal["bursty"] = "bursty"
    rate: Rate
    factor: Annotated[float, Field(ge=1, strict=True, allow_inf_nan=False)] = 3.0
    power: Annotated[int, Field(ge=2, multiple_of=2, strict=True)] = 4
    period: Rate = 60.0

    def blocks(self, random: np.random.Generator) -> Iterator[Times]:
        """Increasing times, without end: arrivals at the highest rate, thinned out."""
        now, high = 0.0, self.rate * self.factor
        while True:
            times = now + np.cumsum(random.exponential(1.0 / high, BLOCK))
            now = float(times[-1])
            swing = np.sin(np.pi * times / self.period) ** self.power
            rates = self.rate * (1.0 + (self.factor - 1.0) * swing)
            kept = times[random.random(BLOCK) * high < rates]
            if len(kept):
                yield kept


class Trace(Section):
    """Arrivals, and lengths unless given, from a CSV file.

    Attributes:
        file: with columns ``arrival, prompt, output`` and perhaps ``context, key``, or in the
            format of the public Azure traces: ``TIMESTAMP, ContextTokens, GeneratedTokens``.
            Arrivals are in seconds; timestamps count from the first row.
        stretch: factor on the gaps; below 1 is more load.
        sort: whether rows may be out of order; they are sorted then, and the report says so.
    """

    kind: Literal["trace"] = "trace"
    file: File
    stretch: Rate = 1.0
    sort: bool = False


class Closed(Section):
    """Users who each wait for an answer, think, and ask again.

    Attributes:
        users: that send their first request at 0.
        think: seconds between an answer and the next request.
        law: of ``think``.
    """

    kind: Literal["closed"] = "closed"
    users: Positive
    think: Number = 0.0
    law: Literal["constant", "exponential"] = "constant"


def _short(value: Any) -> Any:
    return default_kind(tagged(value, "trace", "file") if isinstance(value, str) else value,
                        "poisson")  # fmt: skip


Open = Regular | Poisson | Gamma | NormalGaps | Bursty
Arrivals = Annotated[
    Annotated[Open | Trace | Closed, Field(discriminator="kind")], BeforeValidator(_short)
]
"""``{rate: 3}`` is Poisson, a bare text the file of a trace."""
