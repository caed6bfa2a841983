"""Prompts of requests as token ids."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from jinja2 import TemplateError

from fxgraft.runtime.serve.refusals import refusal, wrong_field
from fxgraft.runtime.serve.schema import ChatRequest, CompletionRequest, Message

Result = TypeVar("Result")


class Prompts:
    """Tokenizes in a thread of its own, so that a long prompt holds nobody up.

    Args:
        tokenizer: of transformers; a copy of it is used, because tokenizers may not be used by
            two threads at once.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
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

    async def of_chat(self, request: ChatRequest) -> list[int]:
        """Token ids of a chat through the tokenizer's template.

        Raises:
            HTTPException: there is no template, or it refuses these messages.
        """
        if not self._tokenizer.chat_template:
            raise refusal(
                400,
                "this model's tokenizer has no chat template: use /v1/completions",
                code="no_chat_template",
            )
        return await self._call(self._chat, request.messages)

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

    def _chat(self, messages: Sequence[Message]) -> list[int]:
        try:
            encoded = self._tokenizer.apply_chat_template(
                [_plain(message) for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise wrong_field(
                "messages", f"do not fit the model's chat template: {error}"
            ) from error
        return cast("list[int]", encoded["input_ids"])


def _plain(message: Message) -> dict[str, str]:
    # Templates of open models know no developer; it is what OpenAI calls the system since.
    role = "system" if message.role == "developer" else message.role
    names = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": message.text, **names}
