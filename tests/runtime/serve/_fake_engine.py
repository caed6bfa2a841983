"""An engine without a model: counts blocks, answers what a script says, fails on demand."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fxgraft.errors import Error, InputError
from fxgraft.generation import SamplingOptions, StopStringMatcher, Vocabulary
from fxgraft.runtime.engine import EngineStats
from tests.core._generation import byte_level_tokenizer

BLOCK = 4
CONTEXT = 256


@dataclass(eq=False)
class FakeRequest:
    """As the engine's."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingOptions
    on_tokens: Callable[[FakeRequest, Sequence[int]], None] | None
    answer: Sequence[int]
    matcher: StopStringMatcher
    inputs: dict[str, float | str]
    tokens: list[int] = field(default_factory=list[int])
    status: str = "queued"
    finish_reason: str | None = None
    error: Error | None = None
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    reused_tokens: int = 0

    @property
    def blocks(self) -> int:
        """Blocks that its tokens need."""
        return -(-(len(self.prompt) + len(self.tokens)) // BLOCK)


@dataclass
class FakeEngine:
    """Answers each prompt with ``answer``; runs ``max_batch`` requests of those that fit.

    Attributes:
        answer: gives the tokens that follow a prompt; endless where it gives fewer than asked.
        blocks_total: blocks of state.
        max_batch: most requests that run together.
        seconds: time of a step.
        before_step: called at each step with the running requests; may raise.
        fail: called with each running request, may give an error that ends it.
    """

    answer: Callable[[FakeRequest], Sequence[int]] = lambda request: list(b"hello ")
    blocks_total: int = 64
    max_batch: int = 4
    seconds: float = 0.0
    before_step: Callable[[list[FakeRequest]], None] = lambda running: None
    fail: Callable[[FakeRequest], Error | None] = lambda request: None
    eos: tuple[int, ...] = ()
    queue: list[FakeRequest] = field(default_factory=list[FakeRequest])
    running: list[FakeRequest] = field(default_factory=list[FakeRequest])
    counts: Counter[str] = field(default_factory=Counter[str])
    threads: set[int] = field(default_factory=set[int])
    seen: list[FakeRequest] = field(default_factory=list[FakeRequest])
    is_closed: bool = False

    def __post_init__(self) -> None:
        self.vocabulary = Vocabulary(byte_level_tokenizer())
        self.numbers = itertools.count()

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingOptions,
        *,
        inputs: Mapping[str, float | str] | None = None,
        images: object = None,
        on_tokens: Callable[[FakeRequest, Sequence[int]], None] | None = None,
    ) -> FakeRequest:
        self.threads.add(threading.get_ident())
        size = len(byte_level_tokenizer())
        assert images is None, "the server refuses images for a model without"
        if not prompt or len(prompt) + sampling.max_new_tokens > CONTEXT:
            raise InputError(f"the prompt has {len(prompt)} tokens", "give between 1 and 256")
        if min(prompt) < 0 or max(prompt) >= size:
            raise InputError("a token id is outside the vocabulary", "use its tokenizer")
        if set(inputs or {}) - {"strength"}:
            raise InputError(f"this model has no per-request input {inputs}", "it has: strength")
        if any(isinstance(value, str) for value in (inputs or {}).values()):
            raise InputError(f"per-request input {inputs} is a text", "give a number")
        if sampling.eos_token_id is None:
            sampling = sampling.model_copy(update={"eos_token_id": self.eos})
        matcher = StopStringMatcher(sampling.stop_strings, self.vocabulary)
        request = FakeRequest(
            f"request-{next(self.numbers)}", tuple(prompt), sampling, on_tokens, (), matcher,
            dict(inputs or {}),
        )  # fmt: skip
        request.answer = self.answer(request) or [0]
        self.seen.append(request)
        self.queue.append(request)
        return request

    def cancel(self, request: FakeRequest) -> None:
        self.threads.add(threading.get_ident())
        if request.finish_reason is None:
            self._end(request, "cancelled")
            self._report(request, [])

    def step(self) -> bool:
        self.threads.add(threading.get_ident())
        if not (self.queue or self.running):
            return False
        time.sleep(self.seconds)
        self._admit()
        self.before_step(self.running)
        self.counts["steps"] += 1
        for request in list(self.running):
            self._advance(request)
        return True

    def stats(self) -> EngineStats:
        ops = Counter({"attention": len(self.running)})
        return EngineStats(
            queued=len(self.queue), running=len(self.running), blocks_total=self.blocks_total,
            blocks_used=sum(r.blocks for r in self.running), layer_ops={0: ops, 1: ops}, policy={},
            **self.counts,
        )  # fmt: skip

    def close(self) -> None:
        self.is_closed = True

    def _admit(self) -> None:
        free = self.blocks_total - sum(request.blocks for request in self.running)
        while self.queue and len(self.running) < self.max_batch and self.queue[0].blocks <= free:
            request = self.queue.pop(0)
            request.status, request.started = "running", time.monotonic()
            self.counts["prompt_tokens"] += len(request.prompt)
            self.running.append(request)
            free -= request.blocks

    def _advance(self, request: FakeRequest) -> None:
        error = self.fail(request)
        if error is not None:
            self._end(request, "error", error)
            self._report(request, [])
            return
        token = request.answer[len(request.tokens) % len(request.answer)]
        request.tokens.append(token)
        self.counts["generated_tokens"] += 1
        stopped = request.matcher.push(token)
        if token in (request.sampling.eos_token_id or ()):
            self._end(request, "eos")
        elif stopped:
            self._end(request, "stop_string")
        elif len(request.tokens) >= request.sampling.max_new_tokens:
            self._end(request, "length")
        self._report(request, [token])

    def _end(self, request: FakeRequest, reason: str, error: Error | None = None) -> None:
        request.status, request.finish_reason, request.error = "finished", reason, error
        for place in (self.queue, self.running):
            if request in place:
                place.remove(request)
        self.counts["finished"] += 1
        self.counts["cancelled"] += reason == "cancelled"
        self.counts["failed"] += reason == "error"

    def _report(self, request: FakeRequest, tokens: Sequence[int]) -> None:
        if request.on_tokens is not None:
            request.on_tokens(request, tokens)
