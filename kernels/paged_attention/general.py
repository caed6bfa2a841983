"""Paged attention by PyTorch's operators: the CPU's implementation, and any device's fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from fxgraft.kernels.paged_attention import reference


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    table: Tensor,
    past: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    interleaved: bool = False,
    longest_past: int = -1,
) -> Tensor:
    """Attend and write; arguments and result are those of ``fxgraft.kernels.paged_attention.op``.

    One step of all rows is one call of the op ``attention`` on gathered blocks, and so are new
    tokens without a past. Other new tokens take a call for each row.
    """
    query, key = reference.rotate(query, key, cos, sin, interleaved)
    rules = {"scale": scale, "window": window, "softcap": softcap}
    lengths = reference.lengths(past)
    output = reference.empty_output(query, value)
    reference.write(key, key_cache, table, past)
    reference.write(value, value_cache, table, past)
    longest = max(lengths, default=-1)
    if longest <= 0:
        output.copy_(torch.ops.fxgraft.attention(query, key, value, sinks=sinks, **rules))
        return _without_inactive(output, lengths)
    if query.shape[2] == 1:
        mask, first = _visible(past, longest, window)
        keys, values = (
            _gather(cache, table, mask, first, longest + 1) for cache in (key_cache, value_cache)
        )
        rules |= {"window": None, "is_causal": False}
        if bool(mask.all()):
            mask = None
        output.copy_(torch.ops.fxgraft.attention(query, keys, values, mask, sinks=sinks, **rules))
        return _without_inactive(output, lengths)
    for row, length in enumerate(lengths):
        if length < 0:
            continue
        start = 0 if window is None else max(0, length + 1 - window)
        keys, values = (
            reference.read(cache, table[row], start, length + query.shape[2])
            for cache in (key_cache, value_cache)
        )
        output[row] = torch.ops.fxgraft.attention(
            query[row : row + 1], keys, values, sinks=sinks, **rules
        )[0]
    return _without_inactive(output, lengths)


def _without_inactive(output: Tensor, lengths: list[int]) -> Tensor:
    for row, length in enumerate(lengths):
        if length < 0:
            output[row] = 0
    return output


def _visible(past: Tensor, longest: int, window: int | None) -> tuple[Tensor, int]:
    """Which tokens a step's queries see, bool [B, longest + 1 - first], and the first column."""
    columns = torch.arange(longest + 1, device=past.device)
    mask = columns <= past[:, None]
    if window is None:
        return mask, 0
    mask &= columns > past[:, None] - window
    first = int(mask.any(0).nonzero()[0])
    return mask[:, first:], first


def _gather(cache: Tensor, table: Tensor, mask: Tensor, first: int, end: int) -> Tensor:
    """Entries [B, H, end - first, D] of each row, 0 where ``mask`` hides them.

    Hidden entries may be anything, also NaN, and so may the blocks that a table names for them.
    """
    size = cache.shape[2]
    begin = first // size
    blocks = table[:, begin : -(-end // size)].long()
    if not bool(mask.all()):
        inside = torch.nn.functional.pad(
            mask, (first - begin * size, blocks.shape[1] * size - (end - begin * size))
        )
        blocks = blocks * inside.view(*blocks.shape, size).any(-1)
    pages = cache[blocks].transpose(1, 2)
    tokens = pages.reshape(*pages.shape[:2], -1, pages.shape[-1])
    tokens = tokens[:, :, first - begin * size : end - begin * size]
    return tokens if bool(mask.all()) else tokens.masked_fill(~mask[:, None, :, None], 0)
