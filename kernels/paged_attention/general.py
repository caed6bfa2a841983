"""Paged attention by PyTorch's operators: the CPU's implementation, and any device's fallback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxgraft.kernels.paged_attention import reference
from fxgraft.kernels.paged_attention.gate import Gate, with_gate


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
    """Attend and write; arguments and result are those of ``fxgraft.kernels.paged_attention.op``.

    One step of all rows is one call of the op ``attention`` on gathered blocks, and so are new
    tokens without a past. Other new tokens take a call for each row.
    """
    query, key = _rotate(query, key, cos, sin, interleaved)
    rules = {"scale": scale, "window": window, "softcap": softcap}
    gate = Gate.of(chosen, gated, key_sum_cache, slots, chosen_cache, keep, factor)
    if gate is not None:
        given = (query, key, value, key_cache, value_cache, table, past)
        return with_gate(paged_attention, given, sinks, gate, rules)
    lengths = reference.lengths(past)
    longest = max(lengths, default=-1)
    if query.shape[2] == 1 and longest > 0:
        caches = ((key, key_cache), (value, value_cache))
        output = _step(query, caches, table, past, lengths, sinks, rules)
        return _without_inactive(output, lengths)
    output = reference.empty_output(query, value)
    reference.write(key, key_cache, table, past)
    reference.write(value, value_cache, table, past)
    if longest <= 0:
        output.copy_(torch.ops.fxgraft.attention(query, key, value, sinks=sinks, **rules))
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


def _rotate(
    query: Tensor, key: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Query and key with rotary position embedding, if there are angles, in one call."""
    if cos is None:
        return query, key
    both = torch.cat((query, key), 1)
    both = torch.ops.fxgraft.rotary(both, cos, sin, interleaved=interleaved)
    heads = query.shape[1]
    return both[:, :heads], both[:, heads:]


def _without_inactive(output: Tensor, lengths: list[int]) -> Tensor:
    for row, length in enumerate(lengths):
        if length < 0:
            output[row] = 0
    return output


def _step(
    query: Tensor,
    caches: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    table: Tensor,
    past: Tensor,
    lengths: list[int],
    sinks: Tensor | None,
    rules: dict[str, Any],
) -> Tensor:
    """One token per row.

    Args:
        query: [B, Hq, 1, D], rotated.
        caches: the new entries [B, Hkv, 1, D] of keys and of values, each with its cache.
        table: as in the op.
        past: as in the op.
        lengths: ``past`` as numbers.
        sinks: as in the op.
        rules: scale, window and softcap.
    """
    size, window = caches[0][1].shape[2], rules["window"]
    active = [row for row, length in enumerate(lengths) if length >= 0]
    chosen = slice(None) if len(active) == len(lengths) else active
    places = past[chosen].long()
    blocks = table[chosen].gather(1, (places // size)[:, None])[:, 0].long()
    for new, cache in caches:
        cache[blocks, :, places % size] = new[chosen, :, 0]
    # The pages from the first that any row sees, and which of their tokens each row sees.
    shortest, longest = min(lengths[row] for row in active), max(lengths)
    begin = 0 if window is None else max(0, shortest + 1 - window) // size
    end = longest // size + 1
    mask = None
    pages = table[:, begin:end].long()
    if len(active) < len(lengths) or shortest < longest or window is not None:
        tokens = torch.arange(begin * size, longest + 1, device=past.device)
        mask = tokens <= past[:, None]
        if window is not None:
            mask &= tokens > past[:, None] - window
        first = torch.arange(begin * size, end * size, size, device=past.device)
        seen = first <= past[:, None]
        if window is not None:
            seen &= first + size > past[:, None] + 1 - window
        pages = pages * seen
    count = longest + 1 - begin * size
    keys, values = (_gather(cache, pages, mask, count) for _, cache in caches)
    output = torch.ops.fxgraft.attention(
        query, keys, values, mask, sinks=sinks, scale=rules["scale"], softcap=rules["softcap"],
        is_causal=False,
    )  # fmt: skip
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _gather(cache: Tensor, pages: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """The first ``count`` tokens of pages [B, P], as [B, H, count, D]; 0 where they are hidden.

    Hidden entries may be anything, also NaN.
    """
    heads, dim = cache.shape[1], cache.shape[3]
    entries = cache.flatten(0, 1).flatten(1)
    index = pages[:, None] * heads + torch.arange(heads, device=cache.device)[:, None]
    found = entries.index_select(0, index.flatten())
    found = found.view(len(pages), heads, -1, dim)[:, :, :count]
    return found if mask is None else found.masked_fill_(~mask[:, None, :, None], 0)
