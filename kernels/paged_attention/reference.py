"""Paged attention in plain PyTorch, one row at a time."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fxgraft.kernels.attention import reference as dense
from fxgraft.kernels.paged_attention.gate import Gate, with_gate
from fxgraft.kernels.rotary import reference as position


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
    chosen: Tensor | None = None,
    gated: Tensor | None = None,
    key_sum_cache: Tensor | None = None,
    slots: Tensor | None = None,
    chosen_cache: Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    interleaved: bool = False,
    longest_past: int = -1,
    keep: int = 0,
    factor: float = 1.0,
) -> Tensor:
    """Attend and write; arguments and result are those of the op in ``op.py``."""
    query, key = rotate(query, key, cos, sin, interleaved)
    gate = Gate.of(chosen, gated, key_sum_cache, slots, chosen_cache, keep, factor)
    if gate is not None:
        given = (query, key, value, key_cache, value_cache, table, past)
        rules = {"scale": scale, "window": window, "softcap": softcap}
        return with_gate(paged_attention, given, sinks, gate, rules)
    output = attend(
        query,
        key,
        value,
        key_cache,
        value_cache,
        table,
        past,
        sinks,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    write(key, key_cache, table, past)
    write(value, value_cache, table, past)
    return output


def rotate(
    query: Tensor, key: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Query and key with rotary position embedding, if there are angles."""
    if cos is None or sin is None:
        return query, key
    return (
        position.rotary(query, cos, sin, interleaved=interleaved),
        position.rotary(key, cos, sin, interleaved=interleaved),
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    table: Tensor,
    past: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """The functional part: rotated query and key, caches that are only read."""
    output = empty_output(query, value).zero_()
    for row, length in enumerate(lengths(past)):
        if length < 0:
            continue
        first = 0 if window is None else max(0, length + 1 - window)
        keys, values = (
            torch.cat((read(cache, table[row], first, length), new[row : row + 1]), 2)
            for cache, new in ((key_cache, key), (value_cache, value))
        )
        output[row : row + 1] = dense.attention(
            query[row : row + 1],
            keys,
            values,
            sinks=sinks,
            scale=scale,
            window=window,
            softcap=softcap,
        )
    return output


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """An output [B, Hq, S, Dv] that is contiguous with heads and tokens exchanged."""
    batch, heads, length, _ = query.shape
    return query.new_empty((batch, length, heads, value.shape[3])).transpose(1, 2)


def lengths(past: Tensor) -> list[int]:
    """``past`` as Python numbers."""
    return cast("list[int]", past.tolist())  # pyright: ignore[reportUnknownMemberType]


def read(cache: Tensor, blocks: Tensor, first: int, end: int) -> Tensor:
    """Entries [1, H, end - first, D] of the tokens first..end of a row with these blocks."""
    size = cache.shape[2]
    begin = first // size
    pages = cache[blocks[begin : -(-end // size)].long()]
    tokens = pages.transpose(0, 1).flatten(1, 2)
    return tokens[None, :, first - begin * size : end - begin * size]


def write(new: Tensor, cache: Tensor, table: Tensor, past: Tensor) -> None:
    """Put the entries [B, H, S, D] of new tokens behind those of each row that is active."""
    size = cache.shape[2]
    active = past >= 0
    index = past[active, None].long() + torch.arange(new.shape[2], device=past.device)
    blocks = table[active].long().gather(1, index // size)
    cache[blocks, :, index % size] = new[active].transpose(1, 2)
