"""N:M patterns: N of every M neighbouring inputs of an output are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from fxgraft.errors import InputError

WIDTHS = (2, 4, 8, 16, 32)
"""Group widths that ``fxgraft::nm_linear`` can hold, those of the published papers among them."""


@dataclass(frozen=True, order=True)
class Pattern:
    """``n`` of every ``m`` neighbouring weights of a row are kept.

    Wanda, SparseGPT and OWL write the number that is pruned first; ``from_pruned`` converts.
    """

    n: int
    m: int

    @property
    def is_dense(self) -> bool:
        """Whether everything is kept."""
        return self.n == self.m

    @property
    def sparsity(self) -> Fraction:
        """Share of the weights that is pruned."""
        return Fraction(self.m - self.n, self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @staticmethod
    def parse(text: str) -> Pattern:
        """``"4:8"`` → 4 of 8 kept."""
        n, m = text.split(":")
        return Pattern(int(n), int(m))

    @staticmethod
    def from_pruned(pruned: int, m: int) -> Pattern:
        """The pattern that other code calls ``pruned:m``: OWL's 5:8 keeps 3 of 8."""
        return Pattern(m - pruned, m)


def candidates(widths: Sequence[int], kept: Sequence[int] | None) -> list[Pattern]:
    """All patterns with these widths and numbers of kept weights, wider groups first.

    Args:
        widths: values of M.
        kept: values of N; None for 1 to M of each M.

    Raises:
        InputError: a width is impossible, or no pattern is left.
    """
    for m in widths:
        if m not in WIDTHS:
            raise InputError(
                f"pass 'flow': m = {m} is no group width", f"use powers of two: {list(WIDTHS)}"
            )
    for n in kept or ():
        if n < 1 or n > max(widths, default=0):
            raise InputError(
                f"pass 'flow': n = {n} cannot be kept of groups of {list(widths)}",
                f"keep 1 to {max(widths, default=0)} weights of a group",
            )
    found = [
        Pattern(n, m)
        for m in sorted(set(widths), reverse=True)
        for n in (range(1, m + 1) if kept is None else sorted(set(kept)))
        if n <= m
    ]
    if not found:
        raise InputError(
            f"pass 'flow': there is no N:M with m in {list(widths)} and n in {list(kept or ())}",
            "give group widths in 'm', and in 'n' numbers up to them",
        )
    return found


def dense(width: int) -> Pattern:
    """The pattern that keeps everything."""
    return Pattern(width, width)
