"""Packs dense weights into the N:M form of ``fxgraft.kernels.nm_linear.layout``, and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.kernels.nm_linear.layout import Layout, layout_of, layout_of_columns


def pack(weight: Tensor, mask: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Pack the weights that a mask keeps.

    A group where the mask keeps fewer than N gets zeros at its first free columns, so ``unpack``
    returns ``weight`` where ``mask`` holds and 0 elsewhere, bit for bit.

    Args:
        weight: [rows, K] of any dtype, or a stack of such weights [E, rows, K].
        mask: bool of the weight's shape, True where a weight is kept.
        n: kept weights of a group.
        m: columns of a group; it divides K.

    Returns:
        values [G / V, N, rows, V] of the weight's dtype, and indices [G / V, W, rows], both
        contiguous; for a stack with E in front.

    Raises:
        InputError: shapes, the pattern, or a group where the mask keeps more than N.
    """
    if weight.dim() == 3 and mask.shape == weight.shape and len(weight):
        packed = [pack(*both, n, m) for both in zip(weight, mask, strict=True)]
        return torch.stack([v for v, _ in packed]), torch.stack([i for _, i in packed])
    if weight.dim() != 2 or mask.shape != weight.shape or mask.dtype != torch.bool:
        raise InputError(
            f"pack got a weight {list(weight.shape)} and a mask {mask.dtype} {list(mask.shape)}",
            "pass a weight [rows, columns], or a stack of some, and a bool mask of that shape",
        )
    layout = layout_of_columns(weight.shape[1], n, m)
    rows = weight.shape[0]
    grouped = mask.reshape(rows, layout.groups, m)
    kept = _filled(grouped, n)
    dense = torch.where(grouped, weight.detach().reshape(grouped.shape), 0)
    values = dense[kept].reshape(rows, layout.chunks, layout.lane, n).permute(1, 3, 0, 2)
    return values.contiguous(), _words(_codes(kept, layout), layout)


def unpack(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    """The dense weight [rows, K] of a packed one, differentiable in ``values``.

    A stack [E, rows, K] for a stack.

    Raises:
        InputError: the tensors do not belong to the pattern.
    """
    if values.dim() == 5 and len(values) == len(indices) > 0:
        return torch.stack([unpack(*both, n, m) for both in zip(values, indices, strict=True)])
    layout = layout_of(values, indices, n, m)
    dense = expand(values, kept_columns(indices, layout))
    return dense.permute(1, 0, 2, 3).reshape(values.shape[2], layout.columns)


def kept_mask(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    """The bool mask [rows, K] of the columns that a packed weight stores, N in every group.

    Raises:
        InputError: the tensors do not belong to the pattern.
    """
    layout = layout_of(values, indices, n, m)
    kept = kept_columns(indices, layout)
    return kept.permute(1, 0, 2, 3).reshape(values.shape[2], layout.columns)


def bit_field(words: Tensor, shifts: Tensor, bits: int) -> Tensor:
    """So many bits of int64 integers, from each of some shifts on; shapes are broadcast."""
    return (words >> shifts) & ((1 << bits) - 1)


def kept_columns(
    indices: Tensor, layout: Layout, field: Callable[[Tensor, Tensor, int], Tensor] = bit_field
) -> Tensor:
    """The columns that packed codes keep.

    Args:
        indices: [G / V, W, rows].
        layout: of the weight.
        field: how bits are taken out of integers, as ``bit_field``.

    Returns:
        Bool [G / V, rows, V, M].
    """
    device, bits = indices.device, layout.code_bits
    shifts = bits * torch.arange(layout.codes_per_word, device=device)
    codes = field(indices.to(torch.int64)[..., None], shifts, bits)
    codes = codes.permute(0, 2, 1, 3).reshape(layout.chunks, indices.shape[2], layout.lane, 1)
    columns = torch.arange(layout.m, device=device)
    if layout.is_mask:
        return field(codes, columns, 1) != 0
    width = layout.position_bits
    positions = field(codes, width * torch.arange(layout.n, device=device), width)
    return (positions[..., None, :] == columns[:, None]).any(-1)


def expand(values: Tensor, kept: Tensor) -> Tensor:
    """Dense [G / V, rows, V, M] from values [G / V, N, rows, V] and their columns."""
    rank = (kept.to(torch.int64).cumsum(-1) - 1).clamp(0, values.shape[1] - 1)
    dense = values.permute(0, 2, 3, 1).gather(-1, rank)
    return torch.where(kept, dense, 0)


def _filled(mask: Tensor, n: int) -> Tensor:
    """The mask [rows, G, M] with exactly N kept in each group."""
    missing = n - mask.sum(-1, keepdim=True)
    if mask.numel() and bool((missing < 0).any()):
        row, group = (int(i) for i in (missing[..., 0] < 0).nonzero()[0])
        raise InputError(
            f"the mask keeps {n - int(missing[row, group])} of {mask.shape[-1]} weights in group "
            f"{group} of row {row}",
            f"keep at most n = {n} in every group",
        )
    return mask | (~mask & ((~mask).cumsum(-1) <= missing))


def _codes(kept: Tensor, layout: Layout) -> Tensor:
    """Int64 codes [rows, G] of bool [rows, G, M]."""
    columns = torch.arange(layout.m, device=kept.device)
    if layout.is_mask:
        return (kept.to(torch.int64) << columns).sum(-1)
    positions = columns.expand(kept.shape)[kept].reshape(*kept.shape[:2], layout.n)
    width = layout.position_bits
    return (positions << (width * torch.arange(layout.n, device=kept.device))).sum(-1)


def _words(codes: Tensor, layout: Layout) -> Tensor:
    """Indices [G / V, W, rows] of int64 codes [rows, G]."""
    shifts = layout.code_bits * torch.arange(layout.codes_per_word, device=codes.device)
    shape = (codes.shape[0], layout.chunks, layout.words, layout.codes_per_word)
    words = (codes.reshape(shape) << shifts).sum(-1).permute(1, 2, 0)
    limit = torch.iinfo(layout.word_dtype)
    words = torch.where(words > limit.max, words - 2 * (int(limit.max) + 1), words)
    return words.to(layout.word_dtype).contiguous()
