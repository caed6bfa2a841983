"""Growing state in blocks, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def append_pages(
    new: Tensor, pool: Tensor, table: Tensor, past: Tensor, *, dim: int, total: int
) -> Tensor:
    """Write and read; arguments and result are those of ``fxgraft.kernels.append_pages.op``."""
    write_pages(new, pool, table, past, dim)
    length = new.shape[dim]
    blocks = pool.movedim(dim, 1)
    index = torch.arange(total, device=new.device) + (past + (length - total))[:, None]
    place = index.clamp(min=0)
    found = blocks[_blocks_of(table, place, blocks.shape[1]), place % blocks.shape[1]]
    real = (index >= 0).view(*index.shape, *[1] * (found.dim() - 2))
    return found.masked_fill(~real, 0).movedim(1, dim).contiguous()


def write_pages(new: Tensor, pool: Tensor, table: Tensor, past: Tensor, dim: int) -> None:
    """Put new tokens behind the past ones."""
    length = new.shape[dim]
    blocks = pool.movedim(dim, 1)
    place = past.clamp(min=0)[:, None] + torch.arange(length, device=new.device)
    blocks[_blocks_of(table, place, blocks.shape[1]), place % blocks.shape[1]] = new.movedim(dim, 1)


def _blocks_of(table: Tensor, place: Tensor, block_size: int) -> Tensor:
    return table.gather(1, place // block_size).long()
