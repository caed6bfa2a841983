"""How one program of the decode kernel attends to its part of a row: a loop over tiles of tokens.

Products go to the tensor cores, or, where one query head in float32 or of many channels would leave
most of them idle, are added up thread by thread. The online softmax is that of Milakov and
Gimelshein, arXiv 1805.02867, algorithm 3.
"""

# Triton's language is untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from fxgraft.kernels.paged_attention.pages import LOWEST, scaled


@triton.jit
def new_logits(queries, new_key, scale, SOFTCAP: tl.constexpr):
    """The logits [G] of a token with the key ``new_key`` [1, D]."""
    return scaled(tl.sum(queries.to(tl.float32) * new_key.to(tl.float32), axis=1), scale, SOFTCAP)


@triton.jit
def with_new(top, total, mixed, looked, score, value):
    """Continue an online softmax by one token with the logits ``score`` [G]."""
    higher = tl.maximum(top, score)
    weight, decay = tl.exp2(score - higher), tl.exp2(top - higher)
    return (
        higher,
        total * decay + weight,
        mixed * decay[:, None] + weight[:, None] * value[None, :],
        looked * decay,
    )


@triton.jit
def _counts(chosen_cache, page, token, end, PAGE: tl.constexpr):
    """Whether the tokens of a tile, in blocks ``page``, are chosen, bool [TILE]."""
    place = page.to(tl.int64) * PAGE + token % PAGE
    return tl.load(chosen_cache + place, mask=token < end, other=0) != 0


@triton.jit
def _places(
    table, page, token, end, key_page, key_token, value_page, value_token,
    PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Where the keys and the values of a tile lie; the blocks of the next tile, asked for early."""
    within, block = token % PAGE, page.to(tl.int64)
    following = tl.load(table + (token + TILE) // PAGE, mask=token + TILE < end, other=0)
    keys = block * key_page + within * key_token
    return keys, block * value_page + within * value_token, following


@triton.jit
def lanes_of(TILE: tl.constexpr, LANES: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr):
    """The places of a tile's tokens, [TILE] or [LANES, TILE // LANES], as a sum of two tensors.

    The tokens of one element of the first tensor are in one block. Without a window parts begin at
    multiples of a tile, so that a whole lane is one element if it divides a block.
    """
    SIZE: tl.constexpr = TILE // LANES
    first, within = tl.arange(0, TILE), tl.zeros((1,), tl.int32)
    if LANES > 1:
        first, within = tl.arange(0, LANES)[:, None] * SIZE, tl.arange(0, SIZE)[None, :]
        if WINDOW > 0 or PAGE % SIZE != 0:
            first, within = first + within, tl.zeros((1, 1), tl.int32)
    return first, within


@triton.jit
def _merged(top, total, mixed, looked, LANES: tl.constexpr):
    """One online softmax from those of LANES lanes, the first dimension."""
    highest = tl.max(top, axis=0)
    decay = tl.exp2(top - highest[None, :])
    total, looked = tl.sum(total * decay, axis=0), tl.sum(looked * decay, axis=0)
    mixed = tl.permute(mixed * decay[:, :, None], (1, 2, 0))
    # By halves, not by tl.sum, for which threads would exchange each element by itself.
    for _ in tl.static_range(LANES.bit_length() - 1):
        halves = mixed.reshape(mixed.shape[0], mixed.shape[1], mixed.shape[2] // 2, 2)
        one, other = tl.split(halves)
        mixed = one + other
    return highest, total, mixed.reshape(mixed.shape[0], mixed.shape[1]), looked


@triton.jit
def by_products(
    query, key_cache, value_cache, chosen_cache, table, page, begin, end, key_page, key_token,
    value_page, value_token, scale,
    SOFTCAP: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query head, without tensor cores; results as those of ``by_dots``.

    Each place of a tile keeps a softmax of its own, so that no two threads have to agree on a
    maximum before the end.
    """
    place = tl.arange(0, TILE)
    column, value_column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    wide = tl.sum(query.to(tl.float32), axis=0)
    top = tl.full((TILE,), LOWEST, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    mixed = tl.zeros((TILE, BLOCK_V), tl.float32)
    looked = total
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        token = start + place
        mask = token < end
        if chosen_cache is not None:
            counts = _counts(chosen_cache, page, token, end, PAGE)
        keys, values, page = _places(
            table, page, token, end, key_page, key_token, value_page, value_token, PAGE, TILE
        )
        key_mask = mask[:, None] & (column < HEAD_DIM)[None, :]
        key = tl.load(key_cache + keys[:, None] + column[None, :], mask=key_mask, other=0.0)
        value_mask = mask[:, None] & (value_column < VALUE_DIM)[None, :]
        value = tl.load(
            value_cache + values[:, None] + value_column[None, :], mask=value_mask, other=0.0
        )
        score = scaled(tl.sum(key.to(tl.float32) * wide[None, :], axis=1), scale, SOFTCAP)
        score = tl.where(mask, score, float("-inf"))
        higher = tl.maximum(top, score)
        weight, decay = tl.exp2(score - higher), tl.exp2(top - higher)
        total = total * decay + weight
        if chosen_cache is not None:
            looked = looked * decay + tl.where(counts, weight, 0.0)
        mixed = mixed * decay[:, None] + weight[:, None] * value.to(tl.float32)
        top = higher
    highest = tl.max(top, axis=0)
    decay = tl.exp2(top - highest)
    one = tl.zeros((1,), tl.float32)
    mixed = tl.sum(mixed * decay[:, None], axis=0)
    total, looked = tl.sum(total * decay, axis=0), tl.sum(looked * decay, axis=0)
    return one + highest, one + total, mixed[None, :], one + looked


@triton.jit
def by_dots(
    query, key_cache, value_cache, chosen_cache, table, page, begin, end, key_page, key_token,
    value_page, value_token, scale,
    SOFTCAP: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All query heads of a kv head, on the tensor cores.

    A tile's tokens are shared out among LANES softmaxes. With one for each warp, no warp waits for
    another before the end.

    Args:
        query: [G, D], rotated.
        chosen_cache: which tokens are chosen, or None.
        page: the blocks of the first tokens, in the shape of the first result of ``lanes_of``.

    Returns:
        The largest logit [G], the sum of weights [G], and the weighted sum of values [G, D], over
        the tokens begin..end; the sum of weights [G] of chosen tokens, if asked for.
    """
    column, value_column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    mixed = tl.zeros((query.shape[0], BLOCK_V), tl.float32)
    if LANES > 1:
        query = tl.broadcast_to(query[None, :, :], (LANES, query.shape[0], BLOCK_D))
        mixed = tl.zeros((LANES, query.shape[1], BLOCK_V), tl.float32)
    total = tl.sum(mixed, axis=-1)
    top, looked = total + LOWEST, total
    first, within = lanes_of(TILE, LANES, PAGE, WINDOW)
    key_offset = tl.expand_dims(within * key_token, -2) + column[:, None]
    value_offset = tl.expand_dims(within * value_token, -1) + value_column[None, :]
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        token = start + first + within
        mask = token < end
        if chosen_cache is not None:
            counts = _counts(chosen_cache, page, token, end, PAGE)
        keys, values, page = _places(
            table, page, start + first, end, key_page, key_token, value_page, value_token, PAGE,
            TILE,
        )  # fmt: skip
        of_key = tl.expand_dims(mask, -2)
        key = tl.load(
            key_cache + tl.expand_dims(keys, -2) + key_offset,
            mask=of_key & (column < HEAD_DIM)[:, None], other=0.0,
        )  # fmt: skip
        value = tl.load(
            value_cache + tl.expand_dims(values, -1) + value_offset,
            mask=tl.expand_dims(mask, -1) & (value_column < VALUE_DIM)[None, :], other=0.0,
        )  # fmt: skip
        score = scaled(tl.dot(query, key, input_precision="ieee"), scale, SOFTCAP)
        score = tl.where(of_key, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=-1))
        weight, decay = tl.exp2(score - tl.expand_dims(higher, -1)), tl.exp2(top - higher)
        total = total * decay + tl.sum(weight, axis=-1)
        if chosen_cache is not None:
            counted = tl.where(tl.expand_dims(counts, -2), weight, 0.0)
            looked = looked * decay + tl.sum(counted, axis=-1)
        mixed = tl.dot(
            weight.to(value.dtype), value, mixed * tl.expand_dims(decay, -1),
            input_precision="ieee",
        )  # fmt: skip
        top = higher
    if LANES > 1:
        top, total, mixed, looked = _merged(top, total, mixed, looked, LANES)
    return top, total, mixed, looked
