"""Finds paragraph breaks and thinking tags in tokens, by an automaton over their bytes.

Whether a tokenizer spells a break as one token or several, the automaton fires at the token that
completes the second newline in a row, once per run of newlines, and only inside an open thinking
section. Tags match as byte strings across tokens. Building it costs one pass over the vocabulary;
running it is one table lookup per token. Most tokens do the same to it, so its tables have one
column for each kind of token and fit into a GPU's first cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxgraft import sources
from fxgraft.errors import InputError
from fxgraft.generation import Vocabulary

_NEWLINE, _RETURN = ord("\n"), ord("\r")
_MOST_STATES = 256
_FIRED = 2


@dataclass(frozen=True)
class Automaton:
    """Tables of a finite automaton over token ids.

    Attributes:
        next_state: uint8 [K, C].
        fire: bool [K, C].
        classes: int32 [V], the column of each token.
        initial: state before the first token.
    """

    next_state: Tensor
    fire: Tensor
    classes: Tensor
    initial: int

    def fired(self, tokens: Sequence[int]) -> list[int]:
        """Places of the tokens that complete a paragraph break where steering is on."""
        if not tokens:
            return []
        fired, _ = torch.ops.fxgraft.token_automaton(
            torch.tensor([tokens], dtype=torch.int64),
            self.next_state,
            self.fire,
            None,
            self.classes,
            initial=self.initial,
        )
        return [place for place, fires in enumerate(fired[0].tolist()) if fires]


@dataclass(frozen=True)
class _State:
    """What is known of the text so far.

    Attributes:
        thinking: inside a thinking section.
        newlines: newlines in a row: 0, 1, or 2 once the run has fired.
        opening, closing: matched length of the opening and closing tag.
    """

    thinking: bool
    newlines: int = 0
    opening: int = 0
    closing: int = 0


def build(
    vocabulary: Sequence[bytes], start: str, end: str, *, everywhere: bool = False
) -> Automaton:
    """Build the automaton for a vocabulary.

    Args:
        vocabulary: bytes of each token.
        start: opening tag of a thinking section.
        end: its closing tag.
        everywhere: treat all text as thinking, whatever the tags.

    Raises:
        InputError: no token has a newline, a tag cannot be spelled, or the tags are too long.
    """
    _check_spelling(vocabulary, () if everywhere else (start, end))
    tags = (start.encode(), end.encode())
    initial = _State(thinking=everywhere)
    states = [initial]
    numbers = {initial: 0}
    next_byte: list[list[int]] = []
    fire_byte: list[list[bool]] = []
    for state in states:  # grows while it is walked
        row, fires = [0] * 256, [False] * 256
        for byte in range(256):
            following, fires[byte] = _advance(state, byte, tags, everywhere)
            if following not in numbers:
                numbers[following] = len(states)
                states.append(following)
            row[byte] = numbers[following]
        next_byte.append(row)
        fire_byte.append(fires)
    if len(states) > _MOST_STATES:
        raise InputError(
            f"the tags {start!r} and {end!r} need {len(states)} states of at most {_MOST_STATES}",
            "use shorter tags",
        )
    next_state, fire = _over_tokens(np.array(next_byte), np.array(fire_byte), vocabulary)
    columns, classes = _merge_columns(next_state.astype(np.uint8), fire)
    tensor = cast(Any, torch).from_numpy
    return Automaton(
        tensor(np.ascontiguousarray(next_state[:, columns].astype(np.uint8))),
        tensor(np.ascontiguousarray(fire[:, columns])),
        tensor(classes.astype(np.int32)),
        initial=0,
    )


@functools.lru_cache(maxsize=4)
def tables_of(source: str, size: int, start: str, end: str, everywhere: bool) -> Automaton:
    """The automaton for a model's tokens; kept, since the neutral check needs it once more.

    Args:
        source: of the tokenizer.
        size: number of tokens.
        start: opening tag of a thinking section.
        end: its closing tag.
        everywhere: treat all text as thinking.
    """
    vocabulary = Vocabulary(sources.tokenizer(source))
    tokens = [vocabulary.bytes_of(token) for token in range(size)]
    return build(tokens, start, end, everywhere=everywhere)


def spells(vocabulary: Sequence[bytes], text: bytes) -> bool:
    """Whether tokens can be put together so that ``text`` stands in what they say."""
    ends = {token for token in vocabulary if token}
    if all(bytes([byte]) in ends for byte in text) or any(text in token for token in ends):
        return True
    reached = [False] * (len(text) + 1)
    for place in range(1, len(text) + 1):
        reached[place] = any(token.endswith(text[:place]) for token in ends) or any(
            reached[before] and text[before:place] in ends for before in range(1, place)
        )
    return (
        any(
            reached[place] and any(token.startswith(text[place:]) for token in ends)
            for place in range(1, len(text))
        )
        or reached[len(text)]
    )


def _check_spelling(vocabulary: Sequence[bytes], tags: tuple[str, ...]) -> None:
    for text in ("\n", *tags):
        if not spells(vocabulary, text.encode()):
            raise InputError(
                f"the tokenizer cannot spell {text!r}, so no thought would ever be steered",
                "set the fields 'start' and 'end' to the tags that the model uses, or give the "
                "tokenizer that belongs to it",
            )


def _merge_columns(
    next_state: NDArray[np.uint8], fire: NDArray[np.bool_]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Tokens that do the same in every state: one token of each kind, and each token's kind."""
    both = np.ascontiguousarray(np.concatenate((next_state, fire.astype(np.uint8))).T)
    keys = both.view(np.dtype((np.void, both.shape[1])))[:, 0]
    _, columns, classes = np.unique(keys, return_index=True, return_inverse=True)
    return columns, classes.reshape(-1)


def _advance(
    state: _State, byte: int, tags: tuple[bytes, bytes], everywhere: bool
) -> tuple[_State, bool]:
    opening = _match(tags[0], state.opening, byte)
    closing = _match(tags[1], state.closing, byte)
    thinking = state.thinking
    if opening == len(tags[0]):
        thinking, opening = True, 0
    if closing == len(tags[1]):
        thinking, closing = False, 0
    newlines, fires = state.newlines, False
    if byte == _NEWLINE:
        fires = newlines == 1
        newlines = min(newlines + 1, _FIRED)
    elif byte != _RETURN:
        newlines = 0
    thinking = thinking or everywhere
    return _State(thinking, newlines, opening, closing), fires and thinking


def _match(tag: bytes, length: int, byte: int) -> int:
    """Length of the longest prefix of ``tag`` that the text now ends with."""
    text = tag[:length] + bytes([byte])
    return next(n for n in range(min(len(text), len(tag)), -1, -1) if text.endswith(tag[:n]))


def _over_tokens(
    next_byte: NDArray[np.int64], fire_byte: NDArray[np.bool_], vocabulary: Sequence[bytes]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Run the byte automaton over every token from every state at once."""
    count = len(next_byte)
    state = np.repeat(np.arange(count)[:, None], len(vocabulary), 1)
    fire = np.zeros(state.shape, dtype=bool)
    lengths = np.array([len(token) for token in vocabulary])
    for place in range(int(lengths.max(initial=0))):
        longer = np.nonzero(lengths > place)[0]
        byte = np.array([vocabulary[int(token)][place] for token in longer])
        before = state[:, longer]
        fire[:, longer] |= fire_byte[before, byte]
        state[:, longer] = next_byte[before, byte]
    return state, fire
