"""``fxgraft::append_pages``: growing state in blocks of a pool that all requests share.

Writes the new tokens' entries behind those that a row has, then returns the row's entries as one
dense tensor, aligned to the end, for ops that have no form of their own on blocks.

Args:
    new: entries of the S new tokens, [B, ..., S, ...] with the tokens along ``dim``.
    pool: [N, ..., block_size, ...], changed in place.
    table: int32 [B, P]; entry p of a row is the block that holds its tokens from p · block_size.
    past: int32 [B], number of tokens before the new ones. A negative number marks a row without a
        request: what is written for it goes to the first block of its table row.
    dim: the dimension of tokens.
    total: number of entries T to return, at most those of the longest row.

Returns:
    [B, ..., T, ...]: a row's last T entries, zeros in front of shorter rows.

Source: Kwon et al., arXiv 2309.06180, section 4.1 (blocks and tables).
"""

from __future__ import annotations

from torch import Tensor

from fxgraft.kernels.append_pages import cost, reference
from fxgraft.kernels.define import define
from fxgraft.kernels.spec import OpSpec


def _fake(
    new: Tensor, pool: Tensor, table: Tensor, past: Tensor, *, dim: int, total: int
) -> Tensor:
    shape = list(new.shape)
    shape[dim] = total
    return new.new_empty(shape)


SPEC = define(
    OpSpec(name="append_pages", kind="state", reference=reference.append_pages, flops=cost.flops),
    "(Tensor new, Tensor(a!) pool, Tensor table, Tensor past, *, int dim, SymInt total) -> Tensor",
    _fake,
)
