"""What is measured of a layer's inputs, the scores of its weights, and masks made from them.

Scores are Wanda's (arXiv 2306.11695, equation 1): |W_ij| · √s_j, with s_j the squared norm of
input j.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.passes.flow.patterns import Pattern
from fxgraft.passes.flow.units import Unit, path_of


@dataclass
class Statistics:
    """Sums over a layer's inputs, for each of its copies (experts).

    Attributes:
        squares: Σ over tokens of x_j², mean over samples, float32 [copies, K].
        products: Σ over tokens of x xᵀ, mean over samples, float32 [copies, K, K]; None unless
            asked for.
        rows: tokens seen by each copy, int64 [copies].
        samples: number of samples.
    """

    squares: Tensor
    products: Tensor | None
    rows: Tensor
    samples: int = 0

    @staticmethod
    def empty(copies: int, width: int, device: torch.device, with_products: bool) -> Statistics:
        """Before the first sample."""
        shape = (copies, width, width)
        return Statistics(
            torch.zeros(copies, width, device=device),
            torch.zeros(shape, device=device) if with_products else None,
            torch.zeros(copies, dtype=torch.int64),
        )

    def add(self, x: Tensor, ends: Tensor | None, samples: int, place: str) -> None:
        """Take in a batch.

        Args:
            x: [..., K]; for several copies [copies, T, K], or rows sorted by copy with ``ends``.
            ends: int [copies], where the rows of each copy end.
            samples: samples in the batch.
            place: the module, for messages.

        Raises:
            InputError: x holds NaN or infinity.
        """
        copies, width = self.squares.shape
        rows = x.detach().reshape(-1, width).float()
        limits = integers(ends) if ends is not None else _even(rows.shape[0], copies)
        keep = self.samples / (self.samples + samples)
        first = 0
        for copy, end in enumerate(limits):
            part = rows[first:end]
            first = end
            self.rows[copy] += part.shape[0]
            total = self.samples + samples
            self.squares[copy].mul_(keep).add_(part.square().sum(0), alpha=1 / total)
            if self.products is not None:
                self.products[copy].mul_(keep).addmm_(part.T, part, alpha=1 / total)
        self.samples += samples
        if not bool(torch.isfinite(self.squares).all()):
            raise InputError(
                f"pass 'flow': the inputs of {place!r} hold NaN or infinite values",
                "check the model and the calibration data; no mask was written",
            )

    @property
    def unseen(self) -> list[int]:
        """Copies (experts) that no token was sent to."""
        return [copy for copy, count in enumerate(integers(self.rows)) if count == 0]

    @property
    def dead(self) -> int:
        """Input channels that were always zero."""
        seen = self.squares[self.rows > 0] if self.rows.numel() > 1 else self.squares
        return int((seen == 0).sum())


def _even(rows: int, copies: int) -> list[int]:
    return [rows * (copy + 1) // copies for copy in range(copies)]


def score(unit: Unit, weights: Tensor, statistics: Statistics) -> Tensor:
    """Wanda's scores, float32 [copies, O, K]; the magnitude for experts that saw no token.

    Raises:
        InputError: the weights hold NaN or infinite values.
    """
    magnitude = weights.float().abs()
    if not bool(torch.isfinite(magnitude).all()):
        raise InputError(
            f"pass 'flow': the weights of {path_of(unit.product)!r} hold NaN or infinite values",
            "check the model; no mask was written",
        )
    norms = statistics.squares.sqrt()
    norms = torch.where((statistics.rows == 0).to(norms.device)[:, None], 1.0, norms)
    return magnitude * norms[:, None, :]


def padded(values: Tensor, width: int, fill: float = 0.0) -> Tensor:
    """Values with columns appended so that groups of ``width`` are whole."""
    missing = -values.shape[-1] % width
    return torch.nn.functional.pad(values, (0, missing), value=fill) if missing else values


def grouped(values: Tensor, width: int) -> Tensor:
    """[..., K] as [..., K / width, width]; ``width`` divides K."""
    return values.reshape(*values.shape[:-1], -1, width)


def group_ranks(scores: Tensor, width: int) -> Tensor:
    """Rank of every score in its group, 0 the largest; of equal ones the first ranks higher.

    Args:
        scores: [..., K], not negative; missing columns of a last short group rank last.
        width: of the groups.

    Returns:
        uint8 [..., K].
    """
    groups = grouped(padded(scores, width, -1.0), width)
    # A stable sort keeps the lower index of equal scores in front, on every device.
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices
    ranks = torch.empty_like(order, dtype=torch.uint8)
    places = torch.arange(width, dtype=torch.uint8, device=order.device).expand_as(order)
    ranks.scatter_(-1, order, places)
    return ranks.flatten(-2)[..., : scores.shape[-1]]


def group_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Keep the ``n`` largest scores of every group; of equal ones the first.

    Args:
        scores: [..., K], not negative; missing columns of a last short group go first.
        pattern: the pattern.

    Returns:
        bool [..., K], True where kept.
    """
    return group_ranks(scores, pattern.m) < pattern.n


def integers(values: Tensor) -> list[int]:
    """The elements of a one-dimensional integer tensor."""
    return cast("list[int]", cast(Any, values).tolist())


def row_mask(scores: Tensor, pruned: int) -> Tensor:
    """Keep all but the ``pruned`` smallest scores of every row, without groups."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(-1, order[..., : scores.shape[-1] - pruned], True)
