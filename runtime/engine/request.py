"""One request, from its arrival to its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from fxgraft.errors import Error
from fxgraft.generation.options import SamplingOptions
from fxgraft.generation.stopping import StopStringMatcher
from fxgraft.runtime.engine.memory import Holding
from fxgraft.runtime.engine.prompt_images import PromptImages

Status = Literal["queued", "prefilling", "running", "preempted", "finished"]
FinishReason = Literal["eos", "stop_string", "length", "cancelled", "error"]
OnTokens = Callable[["Request", Sequence[int]], None]


@dataclass(eq=False)
class Request:
    """A prompt, how to continue it, and what came of it so far.

    Attributes:
        id: unique in its engine.
        prompt: token ids.
        sampling: how tokens are chosen and when the request ends.
        inputs: values of model inputs that a request may set, by name.
        images: of the prompt, until the request ends.
        choices: the op that this request's rows take, by name of the choice input.
        tokens: generated so far.
        status: where it is.
        finish_reason: why it ended, None until then.
        error: what went wrong, if ``finish_reason`` is ``"error"``.
        arrived, started, first_token, finished: seconds of ``time.monotonic``; None until then.
        preemptions: how often it lost its state to others.
        reused_tokens: tokens whose state was found, in its first prefill.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingOptions
    inputs: Mapping[str, float] = field(default_factory=dict[str, float])
    on_tokens: OnTokens | None = None
    images: PromptImages | None = None
    choices: dict[str, int] = field(default_factory=dict[str, int])
    tokens: list[int] = field(default_factory=list[int])
    status: Status = "queued"
    finish_reason: FinishReason | None = None
    error: Error | None = None
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None
    preemptions: int = 0
    reused_tokens: int = 0
    order: int = 0
    generator: torch.Generator | None = None
    matcher: StopStringMatcher | None = None
    # Tokens whose state is computed, or will be by what was launched; tokens asked for.
    past: int = 0
    launched: int = 0
    holding: Holding | None = None
    row: int | None = None

    @property
    def known(self) -> tuple[int, ...]:
        """Prompt and generated tokens."""
        return (*self.prompt, *self.tokens)

    @property
    def is_finished(self) -> bool:
        """Whether it has ended."""
        return self.status == "finished"

    @property
    def all_launched(self) -> bool:
        """Whether as many tokens were asked for as it may have."""
        return self.launched >= self.sampling.max_new_tokens

    def take(self, token: int, now: float) -> None:
        """Add a token; ends the request if it was the last one."""
        self.tokens.append(token)
        if self.first_token is None:
            self.first_token = now
        stopped = self.matcher is not None and self.matcher.push(token)
        if token in (self.sampling.eos_token_id or ()):
            self.end("eos", now)
        elif stopped:
            self.end("stop_string", now)
        elif len(self.tokens) >= self.sampling.max_new_tokens:
            self.end("length", now)

    def end(self, reason: FinishReason, now: float, error: Error | None = None) -> None:
        """Mark it as ended."""
        self.status, self.finish_reason, self.error = "finished", reason, error
        self.finished = now

    def report(self, tokens: Sequence[int]) -> None:
        """Tell whoever waits about new tokens, or about the end."""
        if self.on_tokens is not None:
            self.on_tokens(self, tokens)
