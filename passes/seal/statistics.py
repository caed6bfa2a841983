"""Sums over hidden states by kind of thought, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.generation.prompts import integers
from fxgraft.passes.seal.thoughts import KINDS
from fxgraft.passes.seal.vector import norm

FEW = 300
"""Samples per class below which the direction is uncertain."""


@dataclass
class Sums:
    """Running sums over samples; each sample is a hidden state [L, D] at a break.

    Attributes:
        counts: int64 [2, 3], by half of the traces (even, odd) and kind.
        sums: float64 [2, 3, L, D].
        squares: float64 [3, L, D], sums of squared elements.
        norms: float64 [L], sum of Euclidean norms.
        samples: float32 [n, L, D], the first ones of each kind.
        kinds, halves: int64 [n], of those.
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor
    norms: Tensor
    samples: Tensor
    kinds: Tensor
    halves: Tensor

    @staticmethod
    def of(samples: Tensor, kinds: Tensor, halves: Tensor) -> Sums:
        """Sums over samples [n, L, D] with their kinds and halves int64 [n]."""
        wide = samples.double()
        layers, width = samples.shape[1:]
        place = halves * len(KINDS) + kinds
        sums = wide.new_zeros(2 * len(KINDS), layers, width).index_add_(0, place, wide)
        squares = wide.new_zeros(len(KINDS), layers, width).index_add_(0, kinds, wide.square())
        counts = torch.bincount(place, minlength=2 * len(KINDS)).reshape(2, len(KINDS))
        norms = norm(wide).sum(0)
        return Sums(
            counts, sums.reshape(2, len(KINDS), layers, width), squares, norms, samples.float(),
            kinds, halves,
        )  # fmt: skip

    @staticmethod
    def merged(parts: Sequence[Mapping[str, Tensor]], most_samples: int) -> Sums:
        """The sum of parts (the attributes as a mapping); keeps so many samples per kind."""
        added = {
            name: torch.stack([part[name] for part in parts]).sum(0)
            for name in ("counts", "sums", "squares", "norms")
        }
        kept = {
            name: torch.cat([part[name] for part in parts])
            for name in ("samples", "kinds", "halves")
        }
        first = torch.cat(
            [(kept["kinds"] == kind).nonzero()[:most_samples, 0] for kind in range(len(KINDS))]
        )
        first = first.sort().values
        return Sums(**added, **{name: value[first] for name, value in kept.items()})

    def check(self, against: Sequence[int]) -> None:
        """Refuse a direction between means of which one has no samples.

        Args:
            against: numbers of the kinds that are steered away from.

        Raises:
            InputError: names the empty class and the counts.
        """
        counts = integers(self.counts.sum(0))
        said = ", ".join(f"{n} {kind}" for kind, n in zip(KINDS, counts, strict=True))
        empty = [] if counts[0] else [KINDS[0]]
        if not sum(counts[kind] for kind in against):
            empty.append("/".join(KINDS[kind] for kind in against))
        if empty:
            raise InputError(
                f"no thoughts are of the kind {' and none of the kind '.join(empty)} ({said})",
                "give more or longer traces, or other labels; the mean of nothing is no vector",
            )

    def direction(self, against: Sequence[int], half: int | None = None) -> Tensor:
        """Mean of execution minus the mean of all that is steered away from, float64 [L, D].

        Args:
            against: numbers of the kinds that are steered away from, pooled.
            half: of the traces; None for all.
        """
        counts = self.counts.sum(0) if half is None else self.counts[half]
        sums = self.sums.sum(0) if half is None else self.sums[half]
        kinds = list(against)
        return sums[0] / counts[0] - sums[kinds].sum(0) / counts[kinds].sum()

    def describe(self, place: int, against: Sequence[int]) -> dict[str, Any]:
        """What is known of one layer's direction, as JSON values.

        ``separation``: of the samples of one half projected on the other half's direction, the
        chance that one of execution lies above one of the others (0.5: none), and the distance of
        their means in standard deviations.
        """
        length = float(norm(self.direction(against)[place]))
        mean_norm = float(self.norms[place] / self.counts.sum())
        found: dict[str, Any] = {
            "norm": length,
            "hidden_norm": mean_norm,
            "share": length / mean_norm if mean_norm else 0.0,
            "standard_error": self._standard_error(place, against),
            "split_half_cosine": None,
            "separation": None,
        }
        a, b = (self._half(place, against, half) for half in (0, 1))
        if a is not None and b is not None:
            found["split_half_cosine"] = float(torch.cosine_similarity(a, b, dim=0))
            found["separation"] = self._separation(place, against, (b, a))
        return found

    def _half(self, place: int, against: Sequence[int], half: int) -> Tensor | None:
        counts = self.counts[half]
        if not counts[0] or not counts[list(against)].sum():
            return None
        return self.direction(against, half)[place]

    def _standard_error(self, place: int, against: Sequence[int]) -> float:
        """Of the vector's norm: the root of the summed variances of both means."""
        counts, sums = self.counts.sum(0), self.sums.sum(0)[:, place]
        total = 0.0
        for kinds in ([0], list(against)):
            n = int(counts[kinds].sum())
            mean = sums[kinds].sum(0) / n
            variance = (self.squares[kinds, place].sum(0) / n - mean.square()).clamp(min=0)
            total += float(variance.sum()) / n
        return total**0.5

    def _separation(
        self, place: int, against: Sequence[int], others: tuple[Tensor, Tensor]
    ) -> dict[str, float] | None:
        projected = torch.empty(len(self.samples), dtype=torch.float64)
        for half, direction in enumerate(others):
            rows = self.halves == half
            projected[rows] = self.samples[rows, place].double() @ _unit(direction)
        is_against = torch.isin(self.kinds, torch.tensor(list(against)))
        above, below = projected[self.kinds == 0], projected[is_against]
        if len(above) < 2 or len(below) < 2:
            return None
        spread = ((above.var() + below.var()) / 2).sqrt().clamp(min=1e-12)
        return {
            "auc": _chance_above(above, below),
            "distance": float((above.mean() - below.mean()) / spread),
        }


def _unit(direction: Tensor) -> Tensor:
    # At layer 0 all breaks of one token are alike, and the direction is 0.
    return direction / norm(direction).clamp(min=1e-12)


def _chance_above(above: Tensor, below: Tensor) -> float:
    """Share of pairs in which the first is larger, ties counted half (Mann and Whitney, 1947)."""
    ordered = below.sort().values
    smaller = torch.searchsorted(ordered, above, right=False)
    not_larger = torch.searchsorted(ordered, above, right=True)
    return float((smaller + not_larger).double().mean() / 2 / len(below))
