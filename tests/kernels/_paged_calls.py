"""Calls of ``fxgraft::paged_attention`` on caches that are NaN wherever nothing may be read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.kernels._helpers import randn
from tests.kernels._interpreter import DEVICE

ERRORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
UNUSED = 2**30


@dataclass
class Call:
    """One call: sizes, what is in the cache, options.

    Attributes:
        past: tokens before the new ones, per row; negative for no request.
        angles: channels that rotate, 0 for none.
    """

    past: tuple[int, ...]
    new: int = 1
    kv_heads: int = 2
    group: int = 1
    head_dim: int = 64
    value_dim: int = 0
    page: int = 16
    dtype: torch.dtype = torch.float32
    angles: int = 0
    has_sinks: bool = False
    packed: bool = False
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def arguments(self, seed: int = 0) -> list[Tensor | None]:
        """Random tensors in the op's order, float64, NaN wherever nothing may be read."""
        batch, heads = len(self.past), self.kv_heads * self.group
        value_dim = self.value_dim or self.head_dim
        widths = (heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * value_dim)
        mixed = randn(batch, self.new, sum(widths), dtype=self.dtype, seed=seed)
        parts = mixed.split(widths, 2)
        if not self.packed:
            parts = tuple(part.contiguous() for part in parts)
        dims = (self.head_dim, self.head_dim, value_dim)
        new = [
            part.unflatten(2, (-1, dim)).transpose(1, 2)
            for part, dim in zip(parts, dims, strict=True)
        ]
        table, blocks = self._table(seed)
        caches = self._caches(blocks, table, value_dim, seed)
        angle = randn(batch, 1, self.new, self.angles, dtype=torch.float32, seed=seed + 3)
        turns = [angle.cos(), angle.sin()] if self.angles else [None, None]
        sinks = randn(heads, dtype=self.dtype, seed=seed + 4) if self.has_sinks else None
        past = torch.tensor(self.past, dtype=torch.int32)
        return [*new, *caches, table, past, *turns, sinks]

    def _first(self, past: int) -> int:
        window = self.options.get("window")
        return 0 if window is None else max(0, past + 1 - window)

    def _table(self, seed: int) -> tuple[Tensor, int]:
        """Blocks in any order, none where no query looks."""
        spans = [
            (self._first(past) // self.page, -(-(past + self.new) // self.page)) if past >= 0
            else (0, 0)
            for past in self.past
        ]  # fmt: skip
        count = sum(end - begin for begin, end in spans)
        order = torch.randperm(count + 2, generator=torch.Generator().manual_seed(seed))
        table = torch.full((len(self.past), max(end for _, end in spans) + 2), UNUSED)
        used = 0
        for row, (begin, end) in enumerate(spans):
            table[row, begin:end] = order[used : used + end - begin]
            used += end - begin
        return table.to(torch.int32), count + 2

    def _caches(self, blocks: int, table: Tensor, value_dim: int, seed: int) -> list[Tensor]:
        caches: list[Tensor] = []
        for kind, dim in enumerate((self.head_dim, value_dim)):
            shape = (blocks, self.kv_heads, self.page, dim)
            entries = randn(*shape, dtype=self.dtype, seed=seed + 1 + kind)
            cache = torch.full_like(entries, math.nan)
            for row, past in enumerate(self.past):
                for token in range(self._first(past), past):
                    place = int(table[row, token // self.page]), slice(None), token % self.page
                    cache[place] = entries[place]
            caches.append(cache)
        return caches


def copied(x: Tensor) -> Tensor:
    """The same on the device, with the same strides."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
    return copy.copy_(x)


def assert_near(found: Tensor, expected: Tensor, error: float) -> None:
    """The relative error is below ``error``."""
    difference = (found.cpu().double() - expected).norm() / expected.norm()
    assert difference < error, f"relative error {float(difference):.2e}"
