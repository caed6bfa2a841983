"""Distributions of token counts. All draw whole numbers of at least ``minimum``, by default 1."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, cast

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, model_validator

from fxgraft.runtime.hermes.section import Count, Number, Positive, Rate, Section, tagged

Tokens = npt.NDArray[np.int64]
_MOST = 1 << 40


class _Law(Section, ABC):
    """Base of distributions: draws are rounded and held between two bounds."""

    minimum: Positive = 1
    maximum: Positive = _MOST

    @model_validator(mode="after")
    def _ordered(self) -> _Law:
        if self.minimum > self.maximum:
            raise ValueError(f"has a minimum of {self.minimum} above its maximum {self.maximum}")
        return self

    def draw(self, random: np.random.Generator, count: int) -> Tokens:
        """``count`` lengths."""
        values = np.rint(self.values(random, count))
        return np.clip(values, self.minimum, self.maximum).astype(np.int64)

    @abstractmethod
    def values(self, random: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
        """Draws before rounding."""


class Fixed(_Law):
    """Always the same."""

    kind: Literal["fixed"] = "fixed"
    tokens: Positive

    def values(self, random: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
        """The same number."""
        return np.full(count, float(self.tokens))


class Normal(_Law):
    """Normal, cut off below 1: what is drawn lower is drawn again."""

    kind: Literal["normal"] = "normal"
    mean: Rate
    deviation: Number

    def values(self, random: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
        """Normal draws of at least a half."""
        found = random.normal(self.mean, self.deviation, count)
        low = found < 0.5
        for _ in range(100):
            if not low.any():
                break
            found[low] = random.normal(self.mean, self.deviation, int(low.sum()))
            low = found < 0.5
        return found


class LogNormal(_Law):
    """Log-normal, by its median and the standard deviation of its logarithm."""

    kind: Literal["lognormal"] = "lognormal"
    median: Rate
    deviation: Number

    def values(self, random: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
        """Log-normal draws."""
        return random.lognormal(np.log(self.median), self.deviation, count)


class Uniform(_Law):
    """Uniform between two lengths, both included."""

    kind: Literal["uniform"] = "uniform"
    low: Positive
    high: Positive

    @model_validator(mode="after")
    def _range(self) -> Uniform:
        if self.low > self.high:
            raise ValueError(f"has low {self.low} above high {self.high}")
        return self

    def values(self, random: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
        """Uniform draws."""
        return random.integers(self.low, self.high, count, endpoint=True).astype(np.float64)


class Zipf(_Law):
    """Lengths 1, 2, ... up to ``maximum`` with probabilities falling as ``length ** -exponent``."""

    kind: Literal["zipf"] = "zipf"
    exponent: Rate
    maximum: Annotated[int, Field(ge=1, le=1 << 22, strict=True)] = 4096

    def values(self, random: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
        """Draws by inverting the sums of probabilities."""
        lengths = np.arange(self.minimum, self.maximum + 1, dtype=np.float64)
        return lengths[zipf_places(random, len(lengths), self.exponent, count)]


class Empirical(_Law):
    """Drawn from a list with replacement."""

    kind: Literal["empirical"] = "empirical"
    tokens: tuple[Positive, ...] = Field(min_length=1)

    def values(self, random: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
        """Draws from the list."""
        return random.choice(np.array(self.tokens, np.float64), count)


def zipf_places(
    random: np.random.Generator, places: int, exponent: float, count: int
) -> npt.NDArray[np.int64]:
    """Places 0 .. ``places`` - 1, the first the most likely: ``(place + 1) ** -exponent``."""
    weights = np.arange(1, places + 1, dtype=np.float64) ** -exponent
    bounds = np.cumsum(weights)
    points: npt.NDArray[np.float64] = random.random(count) * bounds[-1]
    return np.asarray(bounds.searchsorted(points, side="right"), np.int64)


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return {"kind": "empirical", "tokens": cast("list[Any]", value)}
    return tagged(value, "fixed", "tokens")


Length = Annotated[
    Annotated[Fixed | Normal | LogNormal | Uniform | Zipf | Empirical, Field(discriminator="kind")],
    BeforeValidator(_short),
]
"""A distribution; a bare number is always that, a list is drawn from."""


class Keys(Section):
    """Whose prior context, or whose prompt start, a request has.

    Attributes:
        law: ``"private"``: every request its own; ``"uniform"`` or ``"zipf"``: one of ``count``.
        count: contexts.
        exponent: of ``zipf``.
    """

    law: Literal["private", "uniform", "zipf"] = "private"
    count: Count = 0
    exponent: Rate = 1.0

    @model_validator(mode="after")
    def _counted(self) -> Keys:
        if self.law != "private" and self.count < 1:
            raise ValueError(f"has law {self.law!r} and no count")
        return self

    def draw(self, random: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        """Numbers of contexts; -1 for private ones."""
        if self.law == "private":
            return np.full(count, -1)
        if self.law == "uniform":
            return random.integers(0, self.count, count)
        return zipf_places(random, self.count, self.exponent, count)
