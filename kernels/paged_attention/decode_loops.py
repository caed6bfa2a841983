"""How one program of the decode kernel attends to its part of a row: a loop over tiles of tokens.

One query head is multiplied and added up; several go to the tensor cores. The online softmax is
that of Milakov and Gimelshein, arXiv 1805.02867, algorithm 3.
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
def new_logits(queries, new_key, split, scale, SOFTCAP: tl.constexpr):
    """The new token's logits [G] for the first split, which has its key; LOWEST for others."""
    score = tl.sum(queries.to(tl.float32) * new_key.to(tl.float32), axis=1)
    return tl.where(split == 0, scaled(score, scale, SOFTCAP), LOWEST)


@triton.jit
def with_new(top, total, mixed, looked, score, value):
    """Continue an online softmax by one token, unless its logits ``score`` are LOWEST."""
    higher = tl.maximum(top, score)
    weight, decay = tl.exp2(score - higher), tl.exp2(top - higher)
    weight = tl.where(score > LOWEST, weight, 0.0)
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
def by_products(
    query, key_cache, value_cache, chosen_cache, table, page, begin, end, key_page, key_token,
    value_page, value_token, scale,
    SOFTCAP: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query head, without tensor cores; as ``by_dots``, but for the token more.

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
    query, first_score, first_value, key_cache, value_cache, chosen_cache, table, page, begin, end,
    key_page, key_token, value_page, value_token, scale,
    SOFTCAP: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All query heads of a kv head, on the tensor cores.

    Args:
        query: [G, D], rotated.
        first_score: [G], the logits of one token more, or LOWEST where there is none.
        first_value: [D], its value.
        chosen_cache: which tokens are chosen, or None.
        page: [TILE], the blocks of the first tokens.

    Returns:
        The largest logit [G], the sum of weights [G], and the weighted sum of values [G, D], over
        the tokens begin..end and that one; the sum of weights [G] of chosen tokens, if asked for.
    """
    column, value_column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    top = first_score
    total = tl.where(first_score > LOWEST, 1.0, 0.0)
    mixed = total[:, None] * first_value[None, :]
    looked = tl.zeros_like(total)
    place = tl.arange(0, TILE)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        token = start + place
        mask = token < end
        if chosen_cache is not None:
            counts = _counts(chosen_cache, page, token, end, PAGE)
        keys, values, page = _places(
            table, page, token, end, key_page, key_token, value_page, value_token, PAGE, TILE
        )
        key_mask = (column < HEAD_DIM)[:, None] & mask[None, :]
        key = tl.load(key_cache + keys[None, :] + column[:, None], mask=key_mask, other=0.0)
        value_mask = mask[:, None] & (value_column < VALUE_DIM)[None, :]
        value = tl.load(
            value_cache + values[:, None] + value_column[None, :], mask=value_mask, other=0.0
        )
        score = scaled(tl.dot(query, key, input_precision="ieee"), scale, SOFTCAP)
        score = tl.where(mask[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        weight, decay = tl.exp2(score - higher[:, None]), tl.exp2(top - higher)
        total = total * decay + tl.sum(weight, axis=1)
        if chosen_cache is not None:
            looked = looked * decay + tl.sum(tl.where(counts[None, :], weight, 0.0), axis=1)
        mixed = tl.dot(
            weight.to(value.dtype), value, mixed * decay[:, None], input_precision="ieee"
        )
        top = higher
    return top, total, mixed, looked
