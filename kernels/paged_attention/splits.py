"""Splits of a row's tokens among programs: who does what, and adding up the parts."""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.paged_attention.pages import LOG2_E, LOWEST


@triton.jit
def part_of(
    length, split, WINDOW: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    """The part (begin, end) of a row's tokens that a split attends to, and the number of parts.

    It follows from the row's own length: SPLITS parts, or as many as keep them from being longer
    than LONGEST, but multiples of LEAST.
    """
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length + 1 - WINDOW, 0)
    tokens = length - first
    wanted = tl.maximum(SPLITS, tl.cdiv(tokens, LONGEST))
    part = tl.cdiv(tl.cdiv(tokens, wanted), LEAST) * LEAST
    parts = tl.maximum(tl.cdiv(tokens, tl.maximum(part, 1)), 1)
    begin = first + split * part
    return begin, tl.minimum(begin + part, length), parts


@triton.jit
def leave_part(
    top, total, mixed, looked, partial, statistics, arrived, pair, split, parts,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_V: tl.constexpr, MOST: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """Store a part's sums; returns whether all the others are there too.

    With three FIELDS, ``looked`` [G] is stored too: the sum of the weights of chosen keys.
    """
    group, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_V)
    row = (pair * MOST + split) * GROUP + group
    mask = group < GROUP
    tl.store(partial + row[:, None] * BLOCK_V + column[None, :], mixed, mask=mask[:, None])
    tl.store(statistics + row * FIELDS, top, mask=mask)
    tl.store(statistics + row * FIELDS + 1, total, mask=mask)
    if FIELDS == 3:
        tl.store(statistics + row * FIELDS + 2, looked, mask=mask)
    tl.debug_barrier()
    before = tl.atomic_add(arrived + pair, 1, sem="acq_rel", scope="gpu")
    return before == parts - 1


@triton.jit
def finish(
    top, total, mixed, looked, sinks, scores, output, head,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Divide by the sum of weights, and store the outputs of the heads from ``head``.

    Args:
        looked: [G], the sum of the weights of chosen keys; read only with ``scores``.
        scores: where the share of those keys is stored, float32 [heads] of the row, or None.
    """
    group, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_V)
    if sinks is not None:
        sink = tl.load(sinks + head + group, mask=group < GROUP, other=0.0).to(tl.float32)
        total += tl.exp2(sink * LOG2_E - top)
    mask = (group < GROUP)[:, None] & (column < VALUE_DIM)[None, :]
    if scores is not None:
        tl.store(scores + head + group, looked / total, mask=group < GROUP)
    result = (mixed / total[:, None]).to(output.dtype.element_ty)
    tl.store(output + group[:, None] * VALUE_DIM + column[None, :], result, mask=mask)


@triton.jit
def _some_parts(
    partial, statistics, row, start, parts,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """The largest logits [BLOCK_G, CHUNK] and sums [BLOCK_G, CHUNK, BLOCK_V] of some parts."""
    group, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_V)
    part = start + tl.arange(0, CHUNK)
    place = row[:, None] + part[None, :] * GROUP
    mask = (group < GROUP)[:, None] & (part < parts)[None, :]
    top = tl.load(statistics + place * FIELDS, mask=mask, other=LOWEST, cache_modifier=".cg")
    values = tl.load(
        partial + place[:, :, None] * BLOCK_V + column[None, None, :],
        mask=mask[:, :, None],
        other=0.0,
        cache_modifier=".cg",
    )
    return top, values


@triton.jit
def add_parts(
    partial, statistics, pair, parts, sinks, scores, output, head,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_V: tl.constexpr,
    MOST: tl.constexpr, CHUNK: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Add up the parts, in an order that is always the same, and store the outputs."""
    group, split = tl.arange(0, BLOCK_G), tl.arange(0, MOST)
    row = pair * MOST * GROUP + group
    # Before anything waits for the first loads: a round trip to L2 takes long.
    tops, values = _some_parts(
        partial, statistics, row, 0, parts, GROUP, BLOCK_G, BLOCK_V, CHUNK, FIELDS
    )
    place = row[:, None] + split[None, :] * GROUP
    mask = (group < GROUP)[:, None] & (split < parts)[None, :]
    all_tops = tl.load(statistics + place * FIELDS, mask=mask, other=LOWEST, cache_modifier=".cg")
    totals = tl.load(statistics + place * FIELDS + 1, mask=mask, other=0.0, cache_modifier=".cg")
    top = tl.max(all_tops, axis=1)
    decay = tl.exp2(all_tops - top[:, None])
    total = tl.sum(totals * decay, axis=1)
    looked = total
    if FIELDS == 3:
        shares = tl.load(
            statistics + place * FIELDS + 2, mask=mask, other=0.0, cache_modifier=".cg"
        )
        looked = tl.sum(shares * decay, axis=1)
    mixed = tl.zeros((BLOCK_G, BLOCK_V), tl.float32)
    for start in range(0, parts, CHUNK):
        next_tops, next_values = tops, values
        if start + CHUNK < parts:
            next_tops, next_values = _some_parts(
                partial, statistics, row, start + CHUNK, parts, GROUP, BLOCK_G, BLOCK_V, CHUNK,
                FIELDS,
            )  # fmt: skip
        mixed += tl.sum(values * tl.exp2(tops - top[:, None])[:, :, None], axis=1)
        tops, values = next_tops, next_values
    finish(
        top, total, mixed, looked, sinks, scores, output, head,
        GROUP, VALUE_DIM, BLOCK_G, BLOCK_V,
    )  # fmt: skip


@triton.jit
def store_zeros(
    output, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The outputs of a row without a request."""
    group, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_V)
    mask = (group < GROUP)[:, None] & (column < VALUE_DIM)[None, :]
    zeros = tl.zeros((BLOCK_G, BLOCK_V), output.dtype.element_ty)
    tl.store(output + group[:, None] * VALUE_DIM + column[None, :], zeros, mask=mask)
