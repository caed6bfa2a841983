"""Prompts of unequal length as one left-padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fxgraft.errors import InputError

TokenIds = Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts, padded on the left.

    Attributes:
        input_ids: int64 [B, S].
        attention_mask: int64 [B, S], 0 at padding, 1 in the last column.
    """

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def lengths(self) -> list[int]:
        """Number of real tokens of each row."""
        return integers(self.attention_mask.sum(dim=1))

    @property
    def starts(self) -> list[int]:
        """Column of each row's first real token."""
        return integers(self.attention_mask.argmax(dim=1))

    @property
    def position_ids(self) -> Tensor:
        """Positions int64 [B, S]: real tokens counted from 0, padding at 0."""
        counted = self.attention_mask.cumsum(dim=1) - 1
        return counted.masked_fill(self.attention_mask == 0, 0)

    @property
    def rows(self) -> list[Tensor]:
        """Each row from its first real token on, int64 [length]."""
        return [row[start:] for row, start in zip(self.input_ids, self.starts, strict=True)]


def integers(values: Tensor) -> list[int]:
    """A 1-D tensor of integers or bools as a list."""
    return cast(Any, values).tolist()


def prepare_prompt(
    input_ids: TokenIds,
    attention_mask: Tensor | None,
    *,
    pad_token_id: int,
    vocab_size: int,
    infer_mask: bool = False,
) -> Prompt:
    """Bring prompts into one left-padded batch and check them.

    Args:
        input_ids: integers [B, S], or [S] for one prompt, or a list of 1-D prompts.
        attention_mask: [B, S], 0 at padding; only with a tensor.
        pad_token_id: fills up the shorter prompts of a list.
        vocab_size: token ids must lie below.
        infer_mask: without a mask, take ``pad_token_id`` for padding, as transformers does when
            it is no end-of-text token.

    Raises:
        InputError: no prompt, an empty one, padding on the right, a token out of range.
    """
    if isinstance(input_ids, Tensor):
        prompt = _from_tensor(input_ids, attention_mask, pad_token_id if infer_mask else None)
    else:
        if attention_mask is not None:
            raise InputError(
                "attention_mask is given with a list of prompts", "leave it out: lists are padded"
            )
        prompt = _from_list(input_ids, pad_token_id)
    _check(prompt, vocab_size)
    return prompt


def _from_tensor(ids: Tensor, mask: Tensor | None, padding: int | None) -> Prompt:
    if ids.dim() == 1:
        ids = ids[None]
        mask = mask[None] if mask is not None and mask.dim() == 1 else mask
    if ids.dim() != 2 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise InputError(
            f"input_ids is {ids.dtype} of shape {tuple(ids.shape)}",
            "give token ids as an integer tensor [batch, sequence]",
        )
    if mask is None:
        mask = torch.ones_like(ids) if padding is None else ids != padding
    if mask.shape != ids.shape:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}",
            "give both the same shape",
        )
    return Prompt(ids.to(torch.int64), (mask != 0).to(ids.device, torch.int64))


def _from_list(
    ids: Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor], padding: int
) -> Prompt:
    given: object = ids
    if isinstance(given, str) or not isinstance(given, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"input_ids is {type(given).__name__} {given!r:.60}",
            "give token ids (a tensor or lists); a tokenizer turns text into them",
        )
    if ids and isinstance(ids[0], int):
        ids = [cast(Sequence[int], ids)]
    try:
        rows = [torch.as_tensor(row) for row in cast(Sequence[Sequence[int] | Tensor], ids)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"input_ids holds something that is no list of token ids: {error}",
            "give each prompt as a list of integers",
        ) from error
    _check_rows(rows)
    width = max(len(row) for row in rows)
    shape, device = (len(rows), width), rows[0].device
    padded = torch.full(shape, padding, dtype=torch.int64, device=device)
    mask = torch.zeros(shape, dtype=torch.int64, device=device)
    for index, row in enumerate(rows):
        padded[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return Prompt(padded, mask)


def _check_rows(rows: list[Tensor]) -> None:
    if not rows:
        raise InputError("no prompt is given", "give at least one")
    for index, row in enumerate(rows):
        if row.numel() == 0:
            raise _empty(index)
        if row.dim() != 1 or row.dtype.is_floating_point or row.dtype == torch.bool:
            raise InputError(
                f"prompt {index} is {row.dtype} of shape {tuple(row.shape)}",
                "give each prompt of a list as one row of integer token ids",
            )


def _check(prompt: Prompt, vocab_size: int) -> None:
    batch, width = prompt.input_ids.shape
    if batch == 0:
        raise InputError("no prompt is given", "give at least one")
    lengths = [0] if width == 0 else prompt.lengths
    if min(lengths) == 0:
        raise _empty(lengths.index(0))
    ends = integers(prompt.attention_mask[:, -1])
    if 0 in ends:
        raise InputError(
            f"prompt {ends.index(0)} ends in padding (attention_mask is 0 in its last column)",
            "pad on the left (tokenizer.padding_side = 'left'), or give a list of prompts; if the "
            "last token belongs to the prompt, give an attention_mask of ones",
        )
    low, high = int(prompt.input_ids.min()), int(prompt.input_ids.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}",
            "use the tokenizer that belongs to this model",
        )


def _empty(row: int) -> InputError:
    return InputError(
        f"prompt {row} is empty", "give at least one token, for example the BOS token"
    )
