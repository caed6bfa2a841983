"""From the tokens of one answer to its text, cut before a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from fxgraft.generation import TextStream, Vocabulary


class AnswerText:
    """The text of one answer as its tokens come.

    Text that may turn out to begin a stop string is held back, so that none of it is ever sent.

    Args:
        vocabulary: of the tokenizer.
        stops: stop strings; the text ends before the first one.

    Attributes:
        is_stopped: whether a stop string was found.
    """

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str] = ()) -> None:
        self._stream = TextStream(vocabulary)
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens make certain."""
        return self._release("".join(self._stream.push(token) for token in tokens))

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        rest = self._release(self._stream.finish())
        if self.is_stopped:
            return rest
        rest, self._held = rest + self._held, ""
        return rest

    def _release(self, text: str) -> str:
        if self.is_stopped:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        self.is_stopped = bool(places)
        cut = min(places) if places else len(self._held) - self._doubtful()
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def _doubtful(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max((_overlap(self._held, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if stop.startswith(text[-length:])), 0)
