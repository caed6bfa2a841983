"""Pricing one step at a time, fast: a step-cost table as look-ups and straight lines.

The parts of one kind are added up on common knots, which is exact. A look-up then takes two or
three dictionary hits and one bisection. What is remembered is a pure function of its key, so the
same step has the same price in any order and in any process.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np

from fxgraft.cost_table_grid import Array, common_knots, on_knots
from fxgraft.errors import InputError

if TYPE_CHECKING:
    from fxgraft.cost_table import Part, StepCostTable

# A line per prompt length; more are forgotten and made again.
_MOST_LINES = 4096
Pair = tuple[float, float]


class Price(NamedTuple):
    """Price of one step.

    Attributes:
        seconds: time of the step.
        joules: energy of the step, None if the table has none.
        extrapolated: whether the step lies outside the table's validity.
    """

    seconds: float
    joules: float | None
    extrapolated: bool = False


class DecodeLine(NamedTuple):
    """Prices of decode steps of a fixed number of sequences, linear in their summed context.

    For ``first <= K <= last`` a step takes ``seconds + seconds_per_key * (K - first)`` seconds and
    ``joules + joules_per_key * (K - first)`` joules (0 if the table has none).
    """

    first: int
    last: int
    seconds: float
    seconds_per_key: float
    joules: float
    joules_per_key: float


# They make named tuples in half the time that the classes take.
new_price: Callable[[type[Price], tuple[float, float | None, bool]], Price] = cast(
    Any, tuple
).__new__
new_line: Callable[[type[DecodeLine], tuple[int, int, float, float, float, float]], DecodeLine] = (
    cast(Any, tuple).__new__
)


class Pricer:
    """Prices steps by one table; see ``StepCostTable.pricer``.

    Attributes:
        outside: ``"error"`` or ``"mark"``.
    """

    def __init__(self, table: StepCostTable, outside: Literal["error", "mark"]) -> None:
        if outside not in ("error", "mark"):
            raise InputError(f"argument 'outside' is {outside!r}", "give 'error' or 'mark'")
        self.outside = outside
        self._energy = table.has_energy
        valid = table.validity
        self._low_tokens, self._high_tokens = valid.tokens
        self._low_sequences, self._high_sequences = valid.sequences
        self._low_new, self._high_new = valid.new_tokens
        self._low_context, self._high_context = valid.context
        step = [part for part in table.parts if part.per == "step"]
        self._tokens = _Values([p for p in step if "tokens" in p.axes], "tokens", valid.tokens)
        rest = [part for part in step if "tokens" not in part.axes]
        self._sequences = _Values(rest, "sequences", valid.sequences)
        self._low_keys = max(self._low_context, 1)
        context = (self._low_keys, valid.context[1])
        self._prefill = _Lines(
            table.parts, "prefill", "new_tokens", valid.new_tokens, valid.context
        )
        self._decode = _Lines(table.parts, "decode", "batch", valid.sequences, context)

    def price(
        self,
        prefills: Sequence[tuple[int, int]] = (),
        decodes: int = 0,
        decode_context: int = 0,
    ) -> Price:
        """Price of one step; see ``StepCostTable.price``."""
        # Steps inside the validity, with sizes that occurred before, without a call per look-up.
        tokens, count = decodes, decodes + len(prefills)
        seconds = joules = 0.0
        inside = self._prefill.inside
        for new, cached in prefills:
            line = inside.get(new)
            if line is None or not line.first <= cached <= line.last:
                return self._price(prefills, decodes, decode_context)
            knot, time, slope, energy, energy_slope = line.pieces[bisect_right(line.knots, cached)]
            far = cached - knot
            seconds += time + slope * far
            joules += energy + energy_slope * far
            tokens += new
        if decodes:
            line = self._decode.inside.get(decodes)
            if line is None or not line.first <= decode_context <= line.last:
                return self._price(prefills, decodes, decode_context)
            place = bisect_right(line.knots, decode_context)
            knot, time, slope, energy, energy_slope = line.pieces[place]
            far = decode_context - knot
            seconds += time + slope * far
            joules += energy + energy_slope * far
        by_tokens, by_sequences = self._tokens.get(tokens), self._sequences.get(count)
        if by_tokens is None or by_sequences is None:
            return self._price(prefills, decodes, decode_context)
        seconds += by_tokens[0] + by_sequences[0]
        energy = joules + (by_tokens[1] + by_sequences[1]) if self._energy else None
        return new_price(Price, (seconds, energy, False))

    def _price(
        self, prefills: Sequence[tuple[int, int]], decodes: int, decode_context: int
    ) -> Price:
        """Price of any step."""
        tokens = decodes
        seconds = joules = 0.0
        marked = False
        for new, cached in prefills:
            if not (
                self._low_new <= new <= self._high_new
                and self._low_context <= cached <= self._high_context
            ):
                marked = self._outside_prefill(new, cached)
            tokens += new
            more, energy = self._prefill.at(new, cached)
            seconds += more
            joules += energy
        count = decodes + len(prefills)
        if count == 0:
            return Price(0.0, 0.0 if self._energy else None)
        if decodes:
            if not self._low_keys * decodes <= decode_context <= self._high_context * decodes:
                marked |= self._outside_decode(decodes, decode_context)
            more, energy = self._decode.at(decodes, decode_context, decodes)
            seconds += more
            joules += energy
        if not (
            self._low_tokens <= tokens <= self._high_tokens
            and self._low_sequences <= count <= self._high_sequences
        ):
            marked |= self._outside_step(tokens, count)
        by_tokens, by_sequences = self._tokens.at(tokens), self._sequences.at(count)
        seconds += by_tokens[0] + by_sequences[0]
        joules += by_tokens[1] + by_sequences[1]
        return Price(seconds, joules if self._energy else None, marked)

    def decode_line(self, decodes: int, decode_context: int) -> DecodeLine:
        """The line that holds around a decode-only step.

        Args:
            decodes: sequences, at least 1.
            decode_context: their summed context; the line begins there.

        Raises:
            InputError: the step is outside the validity and may not be extrapolated.
        """
        line, by_tokens = self._decode.inside.get(decodes), self._tokens.get(decodes)
        by_sequences = self._sequences.get(decodes)
        if (
            line is not None
            and by_tokens is not None
            and by_sequences is not None
            and line.first <= decode_context < line.last
        ):
            place = bisect_right(line.knots, decode_context)
            knot, seconds, slope, joules, energy_slope = line.pieces[place]
            far = decode_context - knot
            seconds += slope * far + (by_tokens[0] + by_sequences[0])
            joules += energy_slope * far + (by_tokens[1] + by_sequences[1])
            found = decode_context, line.knots[place], seconds, slope, joules, energy_slope
            return new_line(DecodeLine, found)
        here = self.price((), decodes, decode_context)
        slope, energy_slope, last = self._decode.slope(decodes, decode_context, decodes)
        if self.outside == "error":
            last = min(last, self._high_context * decodes)
        joules = here.joules or 0.0
        return DecodeLine(decode_context, last, here.seconds, slope, joules, energy_slope)

    def _outside_prefill(self, new: int, cached: int) -> bool:
        if new < 1 or cached < 0:
            raise InputError(f"a prefill of {new} new and {cached} cached tokens is impossible",
                             "give at least one new token and no negative number")  # fmt: skip
        self._refuse("new_tokens", new, self._low_new, self._high_new)
        self._refuse("context", cached, self._low_context, self._high_context)
        return True

    def _outside_decode(self, decodes: int, context: int) -> bool:
        if decodes < 1 or context < decodes:
            raise InputError(f"{decodes} decodes with {context} keys in sum are impossible",
                             "each decode attends at least to its own token")  # fmt: skip
        self._refuse("context", context / decodes, self._low_keys, self._high_context)
        return True

    def _outside_step(self, tokens: int, count: int) -> bool:
        if count < 1:
            raise InputError(
                f"a step of {count} sequences is impossible", "give no negative number"
            )
        self._refuse("tokens", tokens, self._low_tokens, self._high_tokens)
        self._refuse("sequences", count, self._low_sequences, self._high_sequences)
        return True

    def _refuse(self, name: str, value: float, low: int, high: int) -> None:
        if self.outside == "error" and not low <= value <= high:
            raise outside_error(name, value, low, high)


class _Values(dict[int, Pair]):
    """Seconds and joules by one integer: those inside the validity that were asked for before."""

    def __init__(self, parts: Sequence[Part], axis: str, valid: tuple[int, int]) -> None:
        super().__init__()
        self._low, self._high = max(valid[0], 1), valid[1]
        self._line = _Line(*_on_line(parts, axis, self._low, self._high))

    def at(self, key: int) -> Pair:
        """Values at any integer."""
        found = self.get(key)
        if found is None:
            found = self._line.at(key)
            if self._low <= key <= self._high:
                self[key] = found
        return found


def _on_line(
    parts: Sequence[Part], axis: str, low: int, high: int
) -> tuple[list[int], list[float], list[float]]:
    """Knots, seconds and joules of the sum of parts with one axis or none."""
    knots = common_knots([part.axes[axis] for part in parts if part.axes], low, max(high, low))
    found: list[list[float]] = []
    for field in ("seconds", "joules"):
        total = np.zeros(len(knots))
        for part in parts:
            values = part.values(field)
            total += on_knots([part.axes[axis]], values, [knots]) if part.axes else values
        found.append(total.tolist())
    return list(knots), found[0], found[1]


class _Line:
    """Two functions on common knots, linear between them and beyond the last one.

    Attributes:
        knots: where pieces begin.
        first, last: knots.
        pieces: knot, seconds, their slope, joules, their slope; before the first knot, then by
            knot.
    """

    __slots__ = ("first", "knots", "last", "pieces")

    def __init__(self, knots: list[int], seconds: list[float], joules: list[float]) -> None:
        self.knots = knots
        self.first, self.last = knots[0], knots[-1]
        before = (knots[0], seconds[0], 0.0, joules[0], 0.0)
        slopes = _slopes(knots, seconds), _slopes(knots, joules)
        self.pieces = [
            before,
            *zip(knots, seconds, slopes[0], joules, slopes[1], strict=True),
        ]

    def at(self, point: int) -> Pair:
        knot, seconds, slope, joules, energy_slope = self.pieces[bisect_right(self.knots, point)]
        far = point - knot
        return seconds + slope * far, joules + energy_slope * far

    def slope(self, point: int) -> tuple[float, float, int | None]:
        """Slopes at and above a point, and the knot up to which they hold (None: for ever)."""
        place = bisect_right(self.knots, point)
        _, _, slope, _, energy_slope = self.pieces[place]
        return slope, energy_slope, self.knots[place] if place < len(self.knots) else None


def _slopes(knots: Sequence[int], values: Sequence[float]) -> list[float]:
    """Slope of each piece; beyond the last knot values do not fall."""
    slopes = [
        (values[i + 1] - values[i]) / (knots[i + 1] - knots[i]) for i in range(len(knots) - 1)
    ]
    return [*slopes, max(slopes[-1], 0.0) if slopes else 0.0]


class _Lines:
    """Two functions of an integer and a context: for each integer, a line in the context."""

    def __init__(
        self,
        parts: Sequence[Part],
        per: str,
        axis: str,
        valid: tuple[int, int],
        context: tuple[int, int],
    ) -> None:
        chosen = [part for part in parts if part.per == per]
        low = max(valid[0], 1)
        self._outer = common_knots([p.axes.get(axis, ()) for p in chosen], low, max(valid[1], low))
        inner = [p.axes.get("context", ()) for p in chosen]
        self._context = common_knots(inner, context[0], max(context))
        self._grids: list[list[list[float]]] = [
            self._add(chosen, axis, field).tolist() for field in ("seconds", "joules")
        ]
        self._lines: dict[int, _Line] = {}
        self._valid = valid
        # Those of integers inside the validity.
        self.inside: dict[int, _Line] = {}

    def _add(self, parts: Sequence[Part], axis: str, field: Literal["seconds", "joules"]) -> Array:
        total = np.zeros((len(self._outer), len(self._context)))
        for part in parts:
            values = part.values(field)
            if list(part.axes) == ["context", axis]:
                values = values.T
            ordered = [name for name in (axis, "context") if name in part.axes]
            others = [self._outer if name == axis else self._context for name in ordered]
            if ordered:
                values = on_knots([part.axes[name] for name in ordered], values, others)
            total += values[:, None] if ordered == [axis] else values
        return total

    def at(self, outer: int, context: int, times: int = 1) -> Pair:
        """Values at a context that is the sum of ``times`` contexts."""
        line = self._lines.get(outer)
        return (line or self._line(outer, times)).at(context)

    def slope(self, outer: int, context: int, times: int = 1) -> tuple[float, float, int]:
        """Slopes per unit of summed context, and up to where they hold."""
        line = self._lines.get(outer) or self._line(outer, times)
        slope, energy, last = line.slope(context)
        return slope, energy, last if last is not None else 2**62

    def _line(self, outer: int, times: int) -> _Line:
        if len(self._lines) >= _MOST_LINES:
            self._lines.clear()
            self.inside.clear()
        knots = [knot * times for knot in self._context]
        rows = [_row(self._outer, grid, outer) for grid in self._grids]
        self._lines[outer] = line = _Line(knots, *rows)
        if self._valid[0] <= outer <= self._valid[1]:
            self.inside[outer] = line
        return line


def _row(knots: Sequence[int], rows: list[list[float]], point: int) -> list[float]:
    """The grid's row at a point between, or beyond, its knots."""
    if len(knots) == 1 or point <= knots[0]:
        return rows[0]
    place = max(min(bisect_right(knots, point) - 1, len(knots) - 2), 0)
    fraction = (point - knots[place]) / (knots[place + 1] - knots[place])
    pairs = zip(rows[place], rows[place + 1], strict=True)
    row = [low * (1.0 - fraction) + high * fraction for low, high in pairs]
    return list(map(max, row, rows[-1])) if fraction > 1.0 else row


def outside_error(name: str, value: float, low: int, high: int) -> InputError:
    """The error for a step that a table does not answer for."""
    return InputError(
        f"{name} {value:g} is outside the step-cost table, which is valid from {low} to {high}",
        "make a table for that range, or ask for marked extrapolation: pricer(outside='mark'), "
        "in a system file `outside: mark`",
    )
