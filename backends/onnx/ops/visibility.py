"""Which keys a query sees, in ONNX; the rules of ``fxgraft.kernels.attention.mask``."""

from __future__ import annotations

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch

from fxgraft.backends.onnx.assembler import Dims
from fxgraft.backends.onnx.builder import Value
from fxgraft.backends.onnx.call import Call


def visible_keys(
    c: Call, length: sympy.Expr, total: sympy.Expr, key_mask: Value | None, mask_dims: Dims
) -> Value | None:
    """The keep-mask of an attention, queries aligned to the last keys.

    Rules that hide nothing are left out: causality for a single query, a window at least as long
    as the keys can be.

    Args:
        c: a node with the arguments ``is_causal``, ``window`` and ``chunk``.
        length: S, number of queries.
        total: T, number of keys.
        key_mask: bool [B, T].
        mask_dims: its dimensions.

    Returns:
        bool, broadcastable to [B, 1, S, T]; None if every key is visible.
    """
    b, window, chunk = c.b, c.constant("window"), c.constant("chunk")
    key_index = b.range(0, total)
    query_index = b.unsqueeze(b.range(total - length, total), (length,), 1)
    rules: list[Value] = []
    if c.constant("is_causal") and length != 1:
        rules.append(b.call("LessOrEqual", key_index, query_index, dtype=torch.bool))
    if window is not None and not _covers(c, window, total):
        distance = b.call("Sub", query_index, key_index)
        rules.append(b.call("Less", distance, b.constant(window, torch.int64), dtype=torch.bool))
    if chunk is not None and not (c.constant("is_causal") and _covers(c, chunk, total)):
        blocks = [_block_start(c, index, chunk, key_mask) for index in (query_index, key_index)]
        rules.append(b.call("Equal", *blocks, dtype=torch.bool))
    if key_mask is not None:
        rules.append(b.unsqueeze(key_mask, mask_dims, 1, 2))
    if not rules:
        return None
    result = rules[0]
    for rule in rules[1:]:
        result = b.call("And", result, rule)
    return result


def _covers(c: Call, size: int, total: sympy.Expr) -> bool:
    longest = c.context.maximum(total)
    return longest is not None and longest <= size


def _block_start(c: Call, index: Value, chunk: int, key_mask: Value | None) -> Value:
    """Where a position's chunk begins, counted from the row's first real token."""
    b = c.b
    if key_mask is not None:
        index = b.call("Sub", index, _leading_padding(c, key_mask))
    return b.call("Sub", index, b.call("Mod", index, b.constant(chunk, torch.int64, "chunk")))


def _leading_padding(c: Call, key_mask: Value) -> Value:
    """Number of masked keys before the first real one, int64 [B, 1, 1, 1]."""
    b = c.b
    axis = b.constant(1, torch.int64, "axis")
    seen = b.call("CumSum", b.cast(key_mask, torch.int64), axis)
    none_yet = b.call("Equal", seen, b.constant(0, torch.int64, "zero"), dtype=torch.bool)
    count = b.call("ReduceSum", b.cast(none_yet, torch.int64), b.integers(1), keepdims=1)
    return b.call("Unsqueeze", count, b.integers(2, 3))
