"""Thoughts: the paragraphs of a chain of thought, and of which kind each of them is.

Source: SEAL, arXiv 2504.07986, section 3.
"""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from fxgraft.errors import InputError
from fxgraft.generation import Vocabulary

Kind = Literal["execution", "reflection", "transition"]
KINDS: tuple[Kind, ...] = ("execution", "reflection", "transition")
Labeller = Callable[[str], str]
_SENTENCE_END = re.compile(r"[.!?\n]")


@dataclass(frozen=True)
class Thought:
    """A paragraph.

    Attributes:
        place: of the token that completes the break in front of it.
        text: from behind the break to the next one, or to the section's end.
    """

    place: int
    text: str


@dataclass(frozen=True)
class Rule:
    """When a thought is of a kind; one of the conditions suffices.

    Attributes:
        kind: the kind.
        starts: it starts with one of these.
        opening: one of these words is in its first sentence.
        contains: one of these is anywhere in it.
    """

    kind: Kind
    starts: tuple[str, ...] = ()
    opening: tuple[str, ...] = ()
    contains: tuple[str, ...] = ()

    def matches(self, text: str) -> bool:
        """Whether it holds of a thought in lower case."""
        if text.startswith(self.starts) or any(phrase in text for phrase in self.contains):
            return True
        words = re.findall(r"\w+", _SENTENCE_END.split(text, maxsplit=1)[0])
        return any(word in words for word in self.opening)


@dataclass(frozen=True)
class LabelSet:
    """Rules in order; a thought that none of them is for is execution.

    Attributes:
        rules: the first that matches says the kind.
        strips: characters taken off both ends, one set after the other; None: all white space.
    """

    rules: tuple[Rule, ...]
    strips: tuple[str | None, ...] = (None,)

    def __call__(self, text: str) -> Kind:
        """The kind of a thought."""
        for characters in self.strips:
            text = text.strip(characters)
        text = text.lower()
        for rule in self.rules:
            if rule.matches(text):
                return rule.kind
        return "execution"


_REFLECTION = (
    "verify", "make sure", "hold on", "think again", "'s correct", "'s incorrect", "let me check",
    "seems right",
)  # fmt: skip
_TRANSITION = (
    "another way", "another approach", "another method", "another solution", "another strategy",
    "another technique",
)  # fmt: skip

LABEL_SETS: dict[str, LabelSet] = {
    # As the authors released it, their spelling and order of stripping included.
    "seal_math": LabelSet(
        (
            Rule("reflection", starts=("wait",), contains=_REFLECTION),
            Rule(
                "transition",
                starts=("alternatively",),
                contains=("think differenly", *_TRANSITION),
            ),
        ),
        strips=(" ", "\n"),
    ),
    "fixed": LabelSet(
        (
            Rule("reflection", opening=("wait",), contains=_REFLECTION),
            Rule(
                "transition",
                opening=("alternatively",),
                contains=("think differently", *_TRANSITION),
            ),
        )
    ),
}


def labeller(name: str) -> Labeller:
    """A label set by its name, or a function by ``module:function``.

    Raises:
        InputError: there is no such set or function.
    """
    if name in LABEL_SETS:
        return LABEL_SETS[name]
    module, _, function = name.partition(":")
    try:
        found = cast("object", getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"there are no labels {name!r}: {error}",
            f"name a set ({', '.join(LABEL_SETS)}) or a function as 'module:function'",
        ) from error
    if not callable(found):
        raise InputError(f"labels {name!r} is no function", "name one as 'module:function'")
    return cast(Labeller, found)


def kind_of(label: Labeller, text: str) -> int:
    """The number of a thought's kind in ``KINDS``.

    Raises:
        InputError: the function gave something else.
    """
    kind: Any = label(text)
    if kind not in KINDS:
        raise InputError(
            f"the labels call a thought {kind!r}", f"return one of: {', '.join(KINDS)}"
        )
    return KINDS.index(kind)


def split(
    tokens: Sequence[int], breaks: Sequence[int], vocabulary: Vocabulary, end: str
) -> list[Thought]:
    """The thoughts behind breaks.

    Args:
        tokens: of the whole text.
        breaks: places of the tokens that complete a break inside a thinking section, ascending.
        vocabulary: of the tokenizer.
        end: the tag that closes a thinking section.
    """
    found: list[Thought] = []
    for place, following in itertools.pairwise([*breaks, len(tokens)]):
        # A break's token may also hold the beginning of the thought.
        rest = vocabulary.bytes_of(tokens[place]).rpartition(b"\n")[2]
        inner = [vocabulary.bytes_of(token) for token in tokens[place + 1 : following]]
        text = b"".join((rest, *inner)).decode("utf-8", errors="replace")
        found.append(Thought(place, text.partition(end)[0]))
    return found
