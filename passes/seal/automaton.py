"""Finds paragraph breaks and thinking tags in tokens, by an automaton over their bytes.

Whether a tokenizer spells a break as one token or several, the automaton fires at the token that
completes the second newline in a row, once per run of newlines, and only inside an open thinking
section. Tags match as byte strings across tokens. Building it costs one pass over the vocabulary;
running it is one table lookup per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NEWLINE, _RETURN = ord("\n"), ord("\r")
_FIRED = 2


@dataclass(frozen=True)
class Automaton:
    """Tables of a finite automaton over token ids.

    Attributes:
        next_state: uint8 [K, V].
        fire: bool [K, V].
        initial: state before the first token.
    """

    next_state: Tensor
    fire: Tensor
    initial: int


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
    """
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
    next_state, fire = _over_tokens(np.array(next_byte), np.array(fire_byte), vocabulary)
    return Automaton(
        torch.tensor(next_state, dtype=torch.uint8), torch.tensor(fire, dtype=torch.bool), initial=0
    )


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
