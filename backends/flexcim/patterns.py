"""N:M patterns: their rules, how real weights obey them, and what the pair cell needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxgraft.backends.flexcim.hardware import MOST_POSITIONS, Hardware
from fxgraft.errors import InputError, LoweringError

_WIDTHS = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Pattern:
    """At most ``n`` of each ``m`` neighbouring weights along K are kept.

    ``n == m`` means all are kept; ``1:1`` is the dense pattern, stored without selectors.
    """

    n: int
    m: int

    @property
    def density(self) -> float:
        """Share of weights that are kept."""
        return self.n / self.m

    @property
    def is_sparse(self) -> bool:
        """Whether weights are left out, so that activations must be selected."""
        return self.n < self.m

    def compressed(self, length: int) -> int:
        """K_c, rows that a reduction over ``length`` weights needs (specification, section 3)."""
        return -(-length // self.m) * self.n

    def index_bits(self, cell: str) -> int:
        """b, metadata bits beside each weight."""
        if not self.is_sparse or cell == "dense":
            return 0
        return 1 if cell == "pair" else (self.m - 1).bit_length()

    def __str__(self) -> str:
        return "dense" if self == DENSE else f"{self.n}:{self.m}"


DENSE = Pattern(1, 1)


def parse(text: str, node: str = "") -> Pattern:
    """``"dense"`` or ``"N:M"``.

    Raises:
        InputError: it is neither; names the node.
    """
    if text == "dense":
        return DENSE
    n, colon, m = str(text).partition(":")
    if not (colon and n.isdigit() and m.isdigit()):
        raise InputError(f"{_of(node)}pattern {text!r} is none", "give 'dense' or N:M, like '2:4'")
    return Pattern(int(n), int(m))


def check(pattern: Pattern, hardware: Hardware, node: str = "") -> Pattern:
    """Whether a configuration can run a pattern.

    Raises:
        InputError: it cannot; names node and limit.
    """
    n, m = pattern.n, pattern.m
    most = MOST_POSITIONS[hardware.cell]
    if not 1 <= n <= m:
        raise InputError(f"{_of(node)}pattern {n}:{m} keeps {n} of {m}", f"N must be 1 to {m}")
    if m & (m - 1):
        raise InputError(f"{_of(node)}pattern {n}:{m}: M is no power of two", "use M = 4, 8, 16")
    if pattern.is_sparse and m > most and hardware.cell != "dense":
        raise InputError(
            f"{_of(node)}pattern {n}:{m}: cell {hardware.cell!r} selects among at most {most}",
            f"use M up to {most} or another cell",
        )
    return pattern


def check_length(pattern: Pattern, length: int, padded: bool, node: str = "") -> None:
    """M must divide K unless the node was padded.

    Raises:
        InputError: it does not.
    """
    if length % pattern.m and not padded:
        raise InputError(
            f"{_of(node)}K = {length} is no multiple of M = {pattern.m}",
            "choose another M, or list the node under 'padded'",
        )


def check_mask(kept: Tensor, pattern: Pattern, node: str = "") -> None:
    """No group of a real mask may keep more than N.

    Args:
        kept: bool [O, K].
        pattern: what the mask is said to obey.
        node: for the message.

    Raises:
        LoweringError: names node, row and group.
    """
    counts = _groups(kept, pattern.m).sum(-1)
    wrong = (counts > pattern.n).nonzero()
    if len(wrong):
        row, group = (int(place) for place in wrong[0])
        raise LoweringError(
            f"{_of(node)}row {row}, group {group} keeps {int(counts[row, group])} weights, "
            f"more than pattern {pattern} allows",
            "declare a denser pattern, or prune the weight",
        )


def most_kept(kept: Tensor) -> dict[int, int]:
    """The most weights that any group of M keeps, for each M up to 32 that divides K.

    Args:
        kept: bool [O, K].
    """
    found: dict[int, int] = {}
    for m in _WIDTHS:
        if kept.shape[1] % m:
            break
        found[m] = int(_groups(kept, m).sum(-1).max())
    return found


def sparsest(most: Mapping[int, int]) -> Pattern:
    """The sparsest pattern that a mask obeys, the narrowest M among equals; else ``DENSE``.

    Args:
        most: see ``most_kept``.
    """
    best = DENSE
    for m, n in most.items():
        if max(n, 1) / m < best.density:
            best = Pattern(max(n, 1), m)
    return best


def slots(kept: Tensor, pattern: Pattern) -> Tensor:
    """Position inside its group of each stored weight, in increasing order.

    Args:
        kept: bool [O, K] that obeys the pattern.
        pattern: N:M.

    Returns:
        int64 [O, K_c]; -1 where a group keeps fewer than N.
    """
    groups = _groups(kept, pattern.m)
    places = torch.where(groups, torch.arange(pattern.m), pattern.m).sort(-1).values
    chosen = places[..., : pattern.n]
    return torch.where(chosen == pattern.m, -1, chosen).flatten(1)


def pair_factor(positions: Tensor, columns: int) -> int:
    """phi, the most distinct pairs that one row of a tile needs (specification, section 2).

    A row feeds one pair of activations to all columns of a sub-macro, so it is replayed for each
    further pair that some column needs.

    Args:
        positions: of stored weights inside their groups, [O, K_c], -1 for none; in whatever order
            they were put into their group's rows. Increasing order (``slots``) needs fewer
            replays than a random one: at most 3 rather than 4 for 4:8.
        columns: of a sub-macro.
    """
    outputs, rows = positions.shape
    pairs = torch.where(positions < 0, -1, positions // 2)
    padding = -outputs % columns
    pairs = torch.nn.functional.pad(pairs, (0, 0, 0, padding), value=-1)
    blocks = pairs.view(-1, columns, rows)
    distinct = torch.zeros(blocks.shape[0], rows, dtype=torch.int64)
    for pair in range(int(pairs.max()) + 1):
        distinct += (blocks == pair).any(1)
    return max(int(distinct.max()), 1)


def _groups(kept: Tensor, m: int) -> Tensor:
    """[O, K] as [O, ceil(K / M), M], filled up with what is not kept."""
    filled = torch.nn.functional.pad(kept, (0, -kept.shape[1] % m))
    return filled.view(kept.shape[0], -1, m)


def _of(node: str) -> str:
    return f"node {node!r}: " if node else ""
