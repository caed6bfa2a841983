"""The bodies and events that OpenAI's clients expect."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

FinishReason = Literal["stop", "length"]

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Answer:
    """One finished choice.

    Attributes:
        text: of the answer.
        finish_reason: ``stop`` or ``length``.
        tokens: how many it took.
    """

    text: str
    finish_reason: FinishReason
    tokens: int


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens.

    Attributes:
        prompt: of all prompts.
        completion: of all answers.
        cached: of the prompts, those whose state was reused.
    """

    prompt: int
    completion: int
    cached: int = 0

    def as_json(self) -> dict[str, Any]:
        """As in a response."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(frozen=True)
class CompletionFormat:
    """Responses and events of ``/v1/completions``."""

    kind: ClassVar[str] = "text_completion"
    chunk_kind: ClassVar[str] = "text_completion"
    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A finished choice."""
        return self._choice(index, answer.text, answer.finish_reason)

    def opening(self, index: int, prefix: str) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return [self._choice(index, prefix, None)] if prefix else []

    def delta(self, index: int, text: str, finish_reason: FinishReason | None) -> dict[str, Any]:
        """A part of a choice."""
        return self._choice(index, text, finish_reason)

    def _choice(self, index: int, text: str, finish_reason: FinishReason | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


@dataclass(frozen=True)
class ChatFormat:
    """Responses and events of ``/v1/chat/completions``."""

    kind: ClassVar[str] = "chat.completion"
    chunk_kind: ClassVar[str] = "chat.completion.chunk"
    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A finished choice."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }

    def opening(self, index: int, prefix: str) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return [_delta(index, {"role": "assistant", "content": prefix}, None)]

    def delta(self, index: int, text: str, finish_reason: FinishReason | None) -> dict[str, Any]:
        """A part of a choice."""
        return _delta(index, {"content": text} if text else {}, finish_reason)


Format = CompletionFormat | ChatFormat


def _delta(index: int, delta: dict[str, str], reason: FinishReason | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def response(form: Format, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
    """The body of a request that does not stream."""
    choices = [form.choice(index, answer) for index, answer in enumerate(answers)]
    return {**_head(form, form.kind), "choices": choices, "usage": usage.as_json()}


def chunk(form: Format, choices: Sequence[dict[str, Any]], *, wants_usage: bool) -> bytes:
    """An event of a stream."""
    usage = {"usage": None} if wants_usage else {}
    return event({**_head(form, form.chunk_kind), "choices": choices, **usage})


def usage_chunk(form: Format, usage: Usage) -> bytes:
    """The event after the last choice's end, where the request asked for it."""
    return event({**_head(form, form.chunk_kind), "choices": [], "usage": usage.as_json()})


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def _head(form: Format, kind: str) -> dict[str, Any]:
    return {"id": form.id, "object": kind, "created": form.created, "model": form.model}
