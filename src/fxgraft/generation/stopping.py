"""Stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from fxgraft.generation.text import Vocabulary


class StopStringMatcher:
    """Tells for one row when a token completes a stop string.

    Works on UTF-8 bytes, so a stop string may start and end anywhere inside tokens, and tokens
    inside characters. As in transformers' ``StopStringCriteria``, a stop string may start in the
    prompt but must reach into the new token.

    Args:
        stop_strings: non-empty texts.
        vocabulary: of the tokenizer.
        prompt: tokens before the first new one; leave out to match in generated text only.
    """

    def __init__(
        self, stop_strings: Sequence[str], vocabulary: Vocabulary, prompt: Sequence[int] = ()
    ) -> None:
        self._patterns = [text.encode() for text in stop_strings]
        self._vocabulary = vocabulary
        self._keep = max((len(pattern) for pattern in self._patterns), default=1) - 1
        self._tail = b""
        for token in reversed(prompt):
            if len(self._tail) >= self._keep:
                break
            self._tail = vocabulary.bytes_of(token) + self._tail

    def push(self, token: int) -> bool:
        """Take one new token; whether it completes a stop string."""
        piece = self._vocabulary.bytes_of(token)
        text = self._tail + piece
        start = len(self._tail)
        # An occurrence reaches into the new token if it starts at most len - 1 bytes before it.
        found = any(p in text[max(start - len(p) + 1, 0) :] for p in self._patterns)
        self._tail = text[max(len(text) - self._keep, 0) :]
        return found
