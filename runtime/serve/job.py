"""One client's request inside the server: its choices, from submission to text."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from fxgraft.generation import SamplingOptions, Vocabulary
from fxgraft.runtime.serve.answers import FinishReason, Usage
from fxgraft.runtime.serve.image_chats import Prompt
from fxgraft.runtime.serve.refusals import of_error, refusal
from fxgraft.runtime.serve.text import AnswerText
from fxgraft.runtime.serve.worker import Inbox, Tokens, TokenStream, Worker

_REASONS: dict[str, FinishReason] = {"eos": "stop", "stop_string": "stop", "length": "length"}


@dataclass(frozen=True)
class Part:
    """What is new in one choice.

    Attributes:
        index: of the choice.
        text: new text, perhaps none.
        finish_reason: set in a choice's last part.
    """

    index: int
    text: str
    finish_reason: FinishReason | None


class Job:
    """The choices of one request.

    Args:
        worker: runs them.
        vocabulary: of the tokenizer.
        arrived: when the client's request came, seconds of ``time.monotonic``.
    """

    def __init__(self, worker: Worker, vocabulary: Vocabulary, arrived: float) -> None:
        self._worker = worker
        self._vocabulary = vocabulary
        self._arrived = arrived
        self._inbox: Inbox = asyncio.Queue()
        self._choices: dict[TokenStream, _Choice] = {}

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingOptions,
        inputs: Mapping[str, float | str] | None,
    ) -> None:
        """Add a choice."""
        stream = self._worker.submit(prompt, sampling, inputs, self._inbox, self._arrived)
        text = AnswerText(self._vocabulary, sampling.stop_strings)
        self._choices[stream] = _Choice(len(self._choices), text)

    async def taken(self) -> None:
        """Wait until the engine has taken all choices.

        Raises:
            HTTPException: it refuses one.
        """
        results = await asyncio.gather(*(s.taken for s in self._choices), return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise of_error(result) from result

    @property
    def is_open(self) -> bool:
        """Whether a choice has not ended."""
        return any(choice.finish_reason is None for choice in self._choices.values())

    async def next(self) -> list[Part]:
        """Wait for something new; perhaps nothing that makes text.

        Raises:
            HTTPException: a choice failed.
        """
        arrived = [await self._inbox.get()]
        while not self._inbox.empty():
            arrived.append(self._inbox.get_nowait())
        merged: dict[TokenStream, list[Tokens]] = {}
        for stream, tokens in arrived:
            merged.setdefault(stream, []).append(tokens)
        parts = [self._take(stream, several) for stream, several in merged.items()]
        return [part for part in parts if part.text or part.finish_reason]

    def close(self) -> None:
        """Cancel what still runs."""
        for stream in self._choices:
            self._worker.cancel(stream)

    def usage(self, prompts: int) -> Usage:
        """Numbers of tokens, those of a prompt counted once whatever ``n`` is.

        Args:
            prompts: number of prompts; they have equally many choices.
        """
        copies = len(self._choices) // prompts
        firsts = list(self._choices)[::copies]
        cached = sum(s.request.reused_tokens for s in firsts if s.request is not None)
        completion = sum(choice.tokens for choice in self._choices.values())
        return Usage(sum(s.prompt_tokens for s in firsts), completion, cached)

    def tokens_of(self, index: int) -> int:
        """Tokens of one choice."""
        return list(self._choices.values())[index].tokens

    def _take(self, stream: TokenStream, several: list[Tokens]) -> Part:
        choice = self._choices[stream]
        if choice.finish_reason is not None:
            return Part(choice.index, "", None)
        last = several[-1]
        if last.finish_reason is not None and last.finish_reason not in _REASONS:
            raise (
                of_error(last.error) if last.error else refusal(503, "the server is shutting down")
            )
        part = choice.take([t for new in several for t in new.tokens], last.finish_reason)
        if part.finish_reason is not None:
            self._worker.cancel(stream)
        return part


class _Choice:
    def __init__(self, index: int, text: AnswerText) -> None:
        self.index = index
        self.tokens = 0
        self.finish_reason: FinishReason | None = None
        self._text = text

    def take(self, tokens: list[int], reason: str | None) -> Part:
        self.tokens += len(tokens)
        # The token that ends a text is no part of it, special or not.
        text = self._text.push(tokens[:-1] if reason == "eos" else tokens)
        if reason is not None:
            text += self._text.finish()
            self.finish_reason = _REASONS[reason]
        if self._text.is_stopped:
            self.finish_reason = "stop"
        return Part(self.index, text, self.finish_reason)
