"""Positions of tokens in models that count images along several axes (M-RoPE, arXiv 2409.12191).

A text token is one further than the token before it. The tokens of an image all begin where a text
token would stand, lie apart along time, height and width, and the text behind them goes on after
the longest side. So the position of a token is what it is without images, plus a shift by every
image token up to it, plus what is its own on each axis: a running sum, which is a state of one
number when tokens come step by step.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor


def table(model: Any, token: int, grid: Tensor, merge: int) -> Tensor:
    """What the image tokens of a call add to positions, by the model's own ``get_rope_index``.

    Args:
        model: of transformers.
        token: the image token.
        grid: patches of each image along time, height and width, int64 [images, 3].
        merge: patches along height, and along width, that make one token.

    Returns:
        float32 [N, A + 1], a row per image token: on each of A axes, and the shift of all that
        follows. Whole numbers hardly above the sides of an image, so that half precision has them.
    """
    counts = cast("list[int]", cast(Any, grid.prod(1) // merge**2).tolist())
    text = 0 if token else 1
    ids = [text]
    for count in counts:
        ids += [token] * count + [text]
    found = _positions_of(model, torch.tensor([ids]), token, grid)
    rows: list[Tensor] = []
    start = 1
    for count in counts:
        end = start + count
        base = found[0, start - 1] + 1
        # Every token moves all that follow back by the one that text would count, the last one
        # forward by the side of the image as well.
        side = found[0, end] - base
        shift = torch.full((count,), -1)
        shift[-1] += side
        own = found[:, start:end].T - base + 1
        own[-1] -= side
        rows.append(torch.cat([own, shift[:, None]], 1))
        start = end + 1
    return torch.cat(rows).float()


def _positions_of(model: Any, ids: Tensor, token: int, grid: Tensor) -> Tensor:
    """int64 [A, S]."""
    given = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == token).int(),
        "image_grid_thw": grid,
        "attention_mask": torch.ones_like(ids),
    }
    taken = inspect.signature(model.get_rope_index).parameters
    found, _ = model.get_rope_index(**{k: v for k, v in given.items() if k in taken})
    return found[:, 0]


def positions(input_ids: Tensor, counted: Tensor | None, rows: Tensor, token: int) -> Tensor:
    """Positions of all tokens.

    Args:
        input_ids: int64 [B, S].
        counted: positions as if there were no images, int64 [B, S] or [1, S]; default from 0 on.
            Where counting starts makes no difference to rotary embeddings.
        rows: as ``table`` makes it for the image tokens of the batch.
        token: the image token.

    Returns:
        int64 [A, B, S].
    """
    if counted is None:
        counted = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    is_image = input_ids == token
    placed = rows.new_zeros(*input_ids.shape, rows.shape[1])
    placed = placed.masked_scatter(is_image[..., None], rows)
    own, shift = placed[..., :-1], placed[..., -1:][:, None]
    moved, _ = torch.ops.fxgraft.logit_sum(torch.ones_like(shift), shift, is_image, scale=1.0)
    found = counted[..., None] + moved.transpose(1, 2) + own
    return found.round().long().permute(2, 0, 1)
