"""Prompts of requests as token ids."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from jinja2 import TemplateError

from fxgraft.runtime.serve.image_chats import ImageChats, Prompt
from fxgraft.runtime.serve.options import ServeOptions
from fxgraft.runtime.serve.refusals import refusal, wrong_field
from fxgraft.runtime.serve.schema import ChatRequest, CompletionRequest, Message

Result = TypeVar("Result")


class Prompts:
    """Tokenizes and decodes images in a thread of its own, so that neither holds anybody up.

    Args:
        tokenizer: of transformers; a copy of it is used, because tokenizers may not be used by
            two threads at once.
        images: what the server knows of images.
        options: limits.
    """

    def __init__(self, tokenizer: Any, images: ImageChats, options: ServeOptions) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._images, self._options = images, options
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def of_completion(self, request: CompletionRequest) -> list[list[int]]:
        """Token ids of each prompt, in order.

        Raises:
            HTTPException: a prompt is empty.
        """
        prompts = await self._call(self._completion, request.prompt)
        for place, tokens in enumerate(prompts):
            if not tokens:
                raise wrong_field("prompt", f"{place} is empty: give at least one token")
        if not prompts:
            raise wrong_field("prompt", "is an empty list: give at least one prompt")
        return prompts

    async def of_chat(self, request: ChatRequest) -> Prompt:
        """A chat through the tokenizer's template, or the processor's where the model has one.

        Raises:
            HTTPException: there is no template, it refuses these messages, or an image is refused.
        """
        has_images = self._images.check(request.messages, self._options)
        if not (self._tokenizer.chat_template or self._images.has_template):
            raise refusal(
                400,
                "this model's tokenizer has no chat template: use /v1/completions",
                code="no_chat_template",
            )
        by_processor = has_images or self._images.has_template
        work = self._chat_with_images if by_processor else self._chat
        try:
            return await self._call(work, request.messages)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise wrong_field(
                "messages", f"do not fit the model's chat template: {error}"
            ) from error

    async def text_of(self, tokens: Sequence[int]) -> str:
        """A prompt of token ids as text.

        Raises:
            HTTPException: an id is none of the tokenizer's.
        """
        try:
            return await self._call(lambda: str(self._tokenizer.decode(tokens)))
        except (OverflowError, TypeError, ValueError) as error:
            raise wrong_field("prompt", "has a token id outside the vocabulary") from error

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False)

    async def _call(self, work: Callable[..., Result], *values: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *values)

    def _completion(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
        if isinstance(prompt, str):
            return [self._encode(prompt)]
        if all(isinstance(item, int) for item in prompt):
            return [cast("list[int]", prompt)] if prompt else []
        return [item if isinstance(item, list) else self._encode(str(item)) for item in prompt]

    def _encode(self, text: str) -> list[int]:
        return cast("list[int]", self._tokenizer(text)["input_ids"])

    def _chat(self, messages: Sequence[Message]) -> Prompt:
        encoded = self._tokenizer.apply_chat_template(
            [{**message.head, "content": message.text} for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        return Prompt(cast("list[int]", encoded["input_ids"]))

    def _chat_with_images(self, messages: Sequence[Message]) -> Prompt:
        return self._images.prompt(messages, self._options, self._tokenizer.chat_template)
