"""What happens to a request: admission, tokens in, text out, and how it ends early."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from starlette.responses import JSONResponse, Response

from fxgraft.errors import Error
from fxgraft.generation import Vocabulary
from fxgraft.runtime.serve import answers
from fxgraft.runtime.serve.answers import Answer, ChatFormat, CompletionFormat, Format
from fxgraft.runtime.serve.connection import EventStream, unless_disconnected
from fxgraft.runtime.serve.image_chats import NO_IMAGES, ImageChats, Prompt
from fxgraft.runtime.serve.job import Job
from fxgraft.runtime.serve.metrics import Metrics, Throughput
from fxgraft.runtime.serve.model import ServedModel
from fxgraft.runtime.serve.options import ServeOptions
from fxgraft.runtime.serve.prompts import Prompts
from fxgraft.runtime.serve.refusals import of_error, refusal, wrong_field
from fxgraft.runtime.serve.sampling import of_choice, sampling_of
from fxgraft.runtime.serve.schema import ChatRequest, CompletionRequest, Generation
from fxgraft.runtime.serve.worker import Worker

Result = TypeVar("Result")
_COMPLETION_TOKENS = 16
_LONGEST_RETRY = 60


@dataclass(frozen=True)
class _Exchange:
    """A request that runs.

    Attributes:
        body: what the client sent.
        job: its choices.
        form: of the answer.
        prefixes: text in front of each choice.
        prompts: number of prompts.
        deadline: in the event loop's time.
    """

    body: Generation
    job: Job
    form: Format
    prefixes: Sequence[str]
    prompts: int
    deadline: float


class Service:
    """Answers requests with one engine.

    Args:
        worker: the engine's thread.
        model: what is served.
        tokenizer: of transformers.
        options: limits and timeouts.
        images: what the server knows of images; default that it takes none.

    Attributes:
        draining: whether no more requests are taken.
        refused: how many requests were refused because the server was full.
    """

    def __init__(
        self,
        worker: Worker,
        model: ServedModel,
        tokenizer: Any,
        options: ServeOptions,
        images: ImageChats | None = None,
    ) -> None:
        self.worker, self.model, self.options = worker, model, options
        self.prompts = Prompts(tokenizer, images or NO_IMAGES, options)
        self.metrics = Metrics(lambda: worker.stats)
        self.throughput = Throughput()
        self.draining = False
        self.refused = 0
        self._vocabulary = Vocabulary(tokenizer)
        self._preparing = 0
        worker.on_progress = self.throughput.add
        worker.on_finish = self.metrics.observe

    @property
    def state(self) -> str:
        """``ok``, ``draining`` or ``failed``."""
        if self.worker.problem is not None:
            return "failed"
        return "draining" if self.draining else "ok"

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return not self._preparing and not self.worker.open_streams

    async def complete(self, http: Request, body: CompletionRequest) -> Response:
        """Answer ``/v1/completions``.

        Raises:
            HTTPException: it is refused, failed, or took too long.
        """
        with self._admitted(body) as deadline:
            prompts = await self.prompts.of_completion(body)
            prefixes = await self._echo(body, prompts)
            form = CompletionFormat(self.model.name)
            exchange = self._start(
                body, [Prompt(tokens) for tokens in prompts], form, prefixes, deadline
            )
        return await self._answer(http, exchange)

    async def chat(self, http: Request, body: ChatRequest) -> Response:
        """Answer ``/v1/chat/completions``.

        Raises:
            HTTPException: it is refused, failed, or took too long.
        """
        with self._admitted(body) as deadline:
            prompt = await self.prompts.of_chat(body)
            form = ChatFormat(self.model.name)
            exchange = self._start(body, [prompt], form, [""], deadline)
        return await self._answer(http, exchange)

    @contextlib.contextmanager
    def _admitted(self, body: Generation) -> Generator[float]:
        """Count a request while its prompt is prepared; gives its deadline."""
        if body.model != self.model.name:
            raise refusal(
                404,
                f"there is no model {body.model!r}, this server has {self.model.name!r}",
                param="model",
                code="model_not_found",
            )
        if self.state == "failed":
            raise refusal(503, f"{self.worker.problem}: the server must be restarted")
        if self.draining:
            retry = math.ceil(self.options.grace_period) or 1
            raise refusal(503, "the server is shutting down", retry_after=retry)
        self._check_room(self._preparing + 1)
        self._preparing += 1
        try:
            yield asyncio.get_running_loop().time() + self.options.request_timeout
        finally:
            self._preparing -= 1

    def _check_room(self, wanted: int) -> None:
        capacity = self.options.capacity
        excess = len(self.worker.open_streams) + wanted - capacity
        if excess <= 0:
            return
        self.refused += 1
        raise refusal(
            429,
            f"the server is full: {self.options.max_batch} sequences can run and "
            f"{self.options.max_queue} wait",
            code="server_full",
            retry_after=self._retry_after(excess),
        )

    def _retry_after(self, excess: int) -> int:
        """Seconds until that many sequences have ended, if they end evenly."""
        streams, rate = self.worker.open_streams, self.throughput.rate
        if not streams or not rate:
            return 1
        until_all_end = sum(stream.remaining for stream in streams) / rate
        share = min(excess / len(streams), 1.0)
        return min(max(math.ceil(until_all_end * share), 1), _LONGEST_RETRY)

    async def _echo(self, body: CompletionRequest, prompts: list[list[int]]) -> list[str]:
        if not body.echo:
            return [""] * len(prompts)
        if isinstance(body.prompt, str):
            return [body.prompt]
        return [
            item if isinstance(item, str) else await self.prompts.text_of(tokens)
            for item, tokens in zip(_items(body.prompt, len(prompts)), prompts, strict=True)
        ]

    def _start(
        self,
        body: Generation,
        prompts: list[Prompt],
        form: Format,
        prefixes: list[str],
        deadline: float,
    ) -> _Exchange:
        """Give all choices to the engine, or none.

        Raises:
            HTTPException: there is no room, or a field does not fit.
        """
        copies = body.n or 1
        count = len(prompts) * copies
        if count > self.options.capacity:
            raise refusal(400, f"{count} answers at once are over this server's limit of "
                               f"{self.options.capacity}", param="n")  # fmt: skip
        try:
            sampling = [sampling_of(body, self._limit(body, prompt)) for prompt in prompts]
        except Error as error:
            raise of_error(error) from error
        self._check_room(count)
        job = Job(self.worker, self._vocabulary, time.monotonic())
        for prompt, options in zip(prompts, sampling, strict=True):
            for choice in range(copies):
                job.submit(prompt, of_choice(options, choice), body.inputs)
        every = [prefix for prefix in prefixes for _ in range(copies)]
        return _Exchange(body, job, form, every, len(prompts), deadline)

    def _limit(self, body: Generation, prompt: Prompt) -> int:
        """Most new tokens of a prompt's answer."""
        most, context = self.options.max_tokens, self.model.context_length
        if body.limit is not None and body.limit > most:
            raise wrong_field("max_tokens", f"is {body.limit}, this server's limit is {most}")
        room = most if context is None else context - len(prompt.tokens)
        if room < (body.limit or 1):
            raise wrong_field(
                "max_tokens" if room > 0 else "prompt" if isinstance(body, CompletionRequest)
                else "messages",
                f"does not fit: the prompt has {len(prompt.tokens)} tokens, and the context holds "
                f"{context} with the answer",
                code="context_length_exceeded",
            )  # fmt: skip
        default = _COMPLETION_TOKENS if isinstance(body, CompletionRequest) else most
        return body.limit or min(default, most, room)

    async def _answer(self, http: Request, exchange: _Exchange) -> Response:
        try:
            if not exchange.body.stream:
                return await unless_disconnected(http, self._whole(exchange))
            events = self._events(exchange)
            first = await unless_disconnected(http, anext(events))
        except BaseException:
            exchange.job.close()
            raise
        return EventStream(first, events, exchange.job.close)

    async def _whole(self, exchange: _Exchange) -> Response:
        job = exchange.job
        texts = list(exchange.prefixes)
        reasons: dict[int, answers.FinishReason] = {}
        await self._in_time(exchange, job.taken())
        while job.is_open:
            for part in await self._in_time(exchange, job.next()):
                texts[part.index] += part.text
                if part.finish_reason is not None:
                    reasons[part.index] = part.finish_reason
        found = [Answer(text, reasons[i], job.tokens_of(i)) for i, text in enumerate(texts)]
        usage = job.usage(exchange.prompts)
        return JSONResponse(answers.response(exchange.form, found, usage))

    async def _events(self, exchange: _Exchange) -> AsyncIterator[bytes]:
        """The events of a stream; an error before the first one is an answer of its own."""
        job, form, begun = exchange.job, exchange.form, False
        wants_usage = exchange.body.wants_usage
        try:
            await self._in_time(exchange, job.taken())
            while job.is_open:
                parts = await self._in_time(exchange, job.next())
                choices = [] if begun or not parts else _opening(exchange)
                choices += [form.delta(p.index, p.text, p.finish_reason) for p in parts]
                if choices:
                    begun = True
                    yield b"".join(
                        answers.chunk(form, [choice], wants_usage=wants_usage) for choice in choices
                    )
        except HTTPException as error:
            if not begun:
                raise
            yield answers.event({"error": error.detail})
            return
        if wants_usage:
            yield answers.usage_chunk(form, job.usage(exchange.prompts))
        yield answers.DONE

    async def _in_time(self, exchange: _Exchange, work: Awaitable[Result]) -> Result:
        try:
            async with asyncio.timeout_at(exchange.deadline):
                return await work
        except TimeoutError as error:
            limit = self.options.request_timeout
            raise refusal(
                504, f"the answer was not finished within {limit:g} s: ask for fewer tokens",
                code="timeout",
            ) from error  # fmt: skip


def _opening(exchange: _Exchange) -> list[dict[str, Any]]:
    pairs = enumerate(exchange.prefixes)
    return [item for i, prefix in pairs for item in exchange.form.opening(i, prefix)]


def _items(prompt: Sequence[Any], prompts: int) -> Sequence[Any]:
    """The prompts one by one: a list of numbers is a single one."""
    return prompt if len(prompt) == prompts and not isinstance(prompt[0], int) else [prompt]
