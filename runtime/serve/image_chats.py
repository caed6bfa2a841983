"""Chats of models that take images: messages become tokens and pixels by the model's processor."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from fxgraft import images, sources
from fxgraft.program import Program
from fxgraft.runtime.serve.images import read_image
from fxgraft.runtime.serve.options import ServeOptions
from fxgraft.runtime.serve.refusals import refusal, wrong_field
from fxgraft.runtime.serve.schema import ImagePart, Message

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """What the engine takes in.

    Attributes:
        tokens: ids.
        images: the model's image inputs by name; None without images.
    """

    tokens: list[int]
    images: dict[str, Tensor] | None = None


class ImageChats:
    """What a server knows of images.

    Args:
        names: of the model's image inputs; none where it takes no images.
        processor: of transformers, with an image processor and a tokenizer; None: there is none.
        problem: why there is none.
    """

    def __init__(self, names: Sequence[str], processor: Any = None, problem: str = "") -> None:
        self.names = tuple(names)
        self.problem = problem
        self._processor = copy.deepcopy(processor)

    @classmethod
    def of_program(cls, program: Program, processor: Any = None) -> ImageChats:
        """For a model; its processor is looked for where the model came from, unless it is given.

        A model without one is served all the same, and refuses images with the reason.
        """
        names = [spec.name for spec in images.image_inputs(program)]
        if not names:
            return NO_IMAGES
        if processor is not None:
            return cls(names, processor)
        found = find_processor(str(program.origin.get("source") or ""))
        if isinstance(found, str):
            _log.warning("images will be refused: %s", found)
            return cls(names, problem=found)
        return cls(names, found)

    @property
    def has_template(self) -> bool:
        """Whether chats without images go through the processor, too."""
        return bool(self._processor is not None and self._processor.chat_template)

    def check(self, messages: Sequence[Message], options: ServeOptions) -> bool:
        """Whether there are images among these messages.

        Raises:
            HTTPException: there are, and the server takes none or not so many.
        """
        places = [place for place, _ in _images(messages)]
        if not places:
            return False
        if self._processor is None:
            raise refusal(
                400, f"'{places[0]}': {self.problem}", param=places[0], code="images_not_supported"
            )
        if len(places) > options.max_images:
            raise wrong_field(
                places[options.max_images],
                f"is image {options.max_images + 1}, this server's limit is {options.max_images}",
                code="too_many_images",
            )
        return True

    def prompt(self, messages: Sequence[Message], options: ServeOptions, template: str) -> Prompt:
        """Decode the images and put everything through the processor.

        Args:
            messages: of the chat.
            options: limits.
            template: for a processor that has none of its own.

        Raises:
            HTTPException: an image cannot be read.
            ValueError, TypeError, LookupError, TemplateError: the messages do not fit the template.
        """
        read = {
            place: read_image(part.image_url.url, place, options)
            for place, part in _images(messages)
        }
        encoded = self._processor.apply_chat_template(
            [_typed(number, message, read) for number, message in enumerate(messages)],
            chat_template=self._processor.chat_template or template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        tokens = cast("list[int]", encoded["input_ids"][0].tolist())
        if not read:
            return Prompt(tokens)
        return Prompt(tokens, {name: encoded[name] for name in self.names if name in encoded})


NO_IMAGES = ImageChats((), problem="this model takes no images")


def find_processor(source: str) -> Any:
    """The processor that belongs to a model source, or a text that says why there is none."""
    if importlib.util.find_spec("PIL") is None:
        return "the server needs the package Pillow for images: pip install 'fxgraft[serve]'"
    if not source:
        return "it is not known where the model came from: give its processor to the server"
    from transformers import AutoProcessor

    try:
        # Code that lies beside a model is not run.
        found = cast(Any, AutoProcessor).from_pretrained(
            sources.resolve(source), trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        return f"this model has no image processor that can be used: {str(error).splitlines()[0]}"
    if not hasattr(found, "image_processor") or not hasattr(found, "tokenizer"):
        return f"this model has no image processor: {source} holds a {type(found).__name__} only"
    return found


def _images(messages: Sequence[Message]) -> Iterator[tuple[str, ImagePart]]:
    """The parts that are images, with the places of their addresses in the request."""
    for number, message in enumerate(messages):
        for index, part in enumerate(message.parts):
            if isinstance(part, ImagePart):
                yield _place(number, index), part


def _place(message: int, part: int) -> str:
    return f"messages.{message}.content.{part}.image_url.url"


def _typed(number: int, message: Message, read: dict[str, Any]) -> dict[str, Any]:
    """A message as templates of models with images expect it: always in parts."""
    content = [
        {"type": "image", "image": read[_place(number, index)]}
        if isinstance(part, ImagePart)
        else {"type": "text", "text": part.text}
        for index, part in enumerate(message.parts)
    ]
    return {**message.head, "content": content}
