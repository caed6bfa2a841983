"""Which keys a query sees: the one place where attention's visibility rules are written."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from fxgraft.errors import InputError


def check_rules(is_causal: bool, window: int | None, chunk: int | None) -> None:
    """Check that the visibility rules have a meaning together.

    Raises:
        InputError: a window without causality, or a window or chunk below 1.
    """
    if window is not None and not is_causal:
        raise InputError("attention has a window but is_causal=False", "pass a mask as bias")
    for name, size in (("window", window), ("chunk", chunk)):
        if size is not None and size < 1:
            raise InputError(f"attention's {name} is {size}", "pass at least 1, or None")


def check_lengths(query_length: int, total_length: int, is_causal: bool, chunk: int | None) -> None:
    """Check that queries have a position among the keys, if a rule compares positions.

    Raises:
        InputError: there are more queries than keys.
    """
    if (is_causal or chunk is not None) and query_length > total_length:
        raise InputError(
            f"attention has {query_length} queries but only {total_length} keys",
            "keys and masks span past and new tokens: pass at least as many as queries",
        )


def visible_keys(
    query_length: int,
    total_length: int,
    key_mask: Tensor | None,
    *,
    device: torch.device,
    is_causal: bool,
    window: int | None,
    chunk: int | None,
) -> Tensor | None:
    """Build the keep-mask of attention, with the queries aligned to the last keys.

    Query i sits at index i + T - S. Key j is visible if j <= index (``is_causal``), if
    index - j < ``window``, if both lie in the same chunk counted from the row's first real token
    (Llama 4, transformers' ``chunked_overlay``), and if ``key_mask`` has it.

    Args:
        query_length: S; may be symbolic.
        total_length: T; may be symbolic.
        key_mask: bool [B, T], False for padding.
        device: where to build the mask.
        is_causal: no key after the query.
        window: number of most recent keys that a query sees, itself included.
        chunk: length of the blocks that attention stays within.

    Returns:
        bool [S, T] or broadcastable to [B, 1, S, T]; None if every key is visible.
    """
    key_index = torch.arange(total_length, device=device)
    query_index = (torch.arange(query_length, device=device) + (total_length - query_length))[
        :, None
    ]
    rules: list[Tensor] = []
    if is_causal:
        rules.append(key_index <= query_index)
    if window is not None:
        rules.append(query_index - key_index < window)
    if chunk is not None:
        start = 0 if key_mask is None else _leading_padding(key_mask)[:, None, None, None]
        rules.append((query_index - start) // chunk == (key_index - start) // chunk)
    if key_mask is not None:
        rules.append(key_mask[:, None, None, :])
    return reduce(torch.logical_and, rules) if rules else None


def _leading_padding(key_mask: Tensor) -> Tensor:
    seen = key_mask.to(torch.int64).cumsum(-1)
    return (seen == 0).sum(-1)
