"""Attention of one new token per row over a cache in blocks, on a GPU: cases and timing."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fxgraft.kernels.paged_attention.general import paged_attention as by_operators
from fxgraft.kernels.tuning import measure

DTYPE = torch.bfloat16
HEADS, HEAD_DIM, BLOCK = 32, 128, 16
_DISTINCT_BYTES = 256e6
_LEAST_SECONDS = 1e-3
_SCALE = HEAD_DIM**-0.5


@dataclass
class Step:
    """One decode step of ``batch`` rows that see ``context`` tokens each, the new one included.

    Attributes:
        copies: how many such batches lie in the pools, so that no cache holds what a call reads.
    """

    batch: int
    context: int
    group: int
    copies: int
    key_cache: Tensor
    value_cache: Tensor
    table: Tensor
    past: Tensor
    new: tuple[Tensor, Tensor, Tensor]
    angles: tuple[Tensor, Tensor]

    @classmethod
    def make(cls, batch: int, context: int, group: int) -> Step:
        """Random caches, blocks in random order."""
        kv_heads = HEADS // group
        size = 2 * batch * context * kv_heads * HEAD_DIM * DTYPE.itemsize
        copies = max(1, int(-(-_DISTINCT_BYTES // size)))
        rows, pages = copies * batch, -(-context // BLOCK)
        shape = (rows * pages, kv_heads, BLOCK, HEAD_DIM)
        key_cache = torch.empty(shape, dtype=DTYPE, device="cuda").normal_()
        value_cache = torch.empty(shape, dtype=DTYPE, device="cuda").normal_()
        table = torch.randperm(rows * pages, device="cuda").to(torch.int32).view(rows, pages)
        widths = (HEADS * HEAD_DIM, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM)
        merged = torch.randn(batch, 1, sum(widths), dtype=DTYPE, device="cuda")
        query, key, value = (
            part.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for part in merged.split(widths, 2)
        )
        angle = torch.randn(batch, 1, 1, HEAD_DIM, device="cuda")
        past = torch.full((batch,), context - 1, dtype=torch.int32, device="cuda")
        return cls(
            batch, context, group, copies, key_cache, value_cache, table, past,
            (query, key, value), (angle.cos(), angle.sin()),
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        """Bytes of one call: keys and values once, and inputs and outputs."""
        kv_heads = HEADS // self.group
        entries = 2 * self.batch * (self.context + 1) * kv_heads * HEAD_DIM
        return (entries + 2 * self.batch * HEADS * HEAD_DIM) * DTYPE.itemsize

    def ours(self, copy: int) -> Tensor:
        """The op on one of the copies, with rotation and cache write."""
        table = self.table[copy * self.batch : (copy + 1) * self.batch]
        return cast(Any, torch.ops.fxgraft).paged_attention(
            *self.new, self.key_cache, self.value_cache, table, self.past, *self.angles,
            scale=_SCALE,
        )  # fmt: skip

    def library(self, copy: int) -> Tensor:
        """PyTorch's attention on a contiguous cache of that size, without rotation and write."""
        shape = (self.copies, self.batch, HEADS // self.group, -1, HEAD_DIM)
        key, value = self.key_cache.view(shape)[copy], self.value_cache.view(shape)[copy]
        return scaled_dot_product_attention(
            self.new[0], key, value, scale=_SCALE, enable_gqa=self.group > 1
        )

    def seconds(self, function: str) -> float:
        """Time of one call in a CUDA graph of calls on one copy after the other."""
        calls = max(self.copies, min(256, int(_LEAST_SECONDS * 3e12 / self.bytes)))
        run = getattr(self, function)
        return measure([partial(run, i % self.copies) for i in range(calls)])

    def error(self) -> float:
        """Relative error of the first and the last row, against operators in float32."""
        found = self.ours(0)
        worst = 0.0
        for row in {0, self.batch - 1}:
            blocks = self.table[row].long()
            caches = (cache[blocks].float() for cache in (self.key_cache, self.value_cache))
            table = torch.arange(blocks.numel(), dtype=torch.int32, device="cuda")[None]
            expected = cast(Any, by_operators)(
                *(part[row : row + 1].float() for part in self.new), *caches, table,
                self.past[:1], *(angle[row : row + 1] for angle in self.angles), scale=_SCALE,
            )[0]  # fmt: skip
            worst = max(worst, float((found[row] - expected).norm() / expected.norm()))
        return worst


def prepare() -> None:
    """Compile the kernels, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, context) as pool:
        list(pool.map(_compile, (1, 4, 8)))


def _compile(group: int) -> None:
    Step.make(1, 2048, group).ours(0)


def cases(contexts: tuple[int, ...] = (2048, 8192, 32768)) -> list[tuple[int, int, int]]:
    """(batch, context, group) of all steps that are measured."""
    found = [(b, c, g) for g in (1, 4, 8) for b in (1, 8, 64) for c in contexts]
    return found + [(1, 131072, g) for g in (1, 4, 8)]
