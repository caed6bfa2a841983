"""The server's options: from the command line, or from a pipeline file's ``serve`` section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from fxgraft.errors import InputError
from fxgraft.runtime.dsla_serve import Rules
from fxgraft.runtime.engine import EngineOptions
from fxgraft.validation import Loc, Where, nowhere, readable


class ServeOptions(EngineOptions):
    """Address, limits and timeouts of a server, and the options of its engine."""

    model_config = ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    served_name: str | None = Field(default=None, min_length=1)
    """Name of the model in requests, default the pipeline file's."""
    max_queue: int = Field(default=64, ge=0)
    """Most sequences that wait beside those that run; more are refused with status 429."""
    max_tokens: int = Field(default=4096, ge=1)
    """Most new tokens of one answer."""
    max_body_bytes: int = Field(default=4 * 2**20, ge=1)
    """Most bytes of a request's body."""
    max_images: int = Field(default=8, ge=0)
    """Most images in one request, where the model takes any."""
    max_image_bytes: int = Field(default=8 * 2**20, ge=1)
    """Most bytes of one image, as it is sent."""
    max_image_pixels: int = Field(default=2**24, ge=1)
    """Most pixels of one image, as it is sent."""
    request_timeout: float = Field(default=600.0, gt=0)
    """Seconds after which a request is ended."""
    grace_period: float = Field(default=30.0, ge=0)
    """Seconds that running requests have to finish after SIGTERM."""
    dsla: Rules | None = None
    """Rules by which layers of running requests become linear; needs pass dsla with `live`."""
    dsla_log: str | None = Field(default=None, min_length=1)
    """File to which each decision of these rules is appended, for `replay`."""

    @property
    def capacity(self) -> int:
        """Most sequences that run or wait."""
        return self.max_batch + self.max_queue

    @property
    def engine(self) -> EngineOptions:
        """Those of the engine."""
        return EngineOptions(**{name: getattr(self, name) for name in EngineOptions.model_fields})


def read_options(
    section: Mapping[str, Any], changes: Mapping[str, Any], where: Where = nowhere
) -> ServeOptions:
    """Options of a pipeline file's ``serve`` section, changed on the command line.

    Args:
        section: keys and values of the section.
        changes: those given on the command line; None: not given.
        where: gives the place of a key in the pipeline file.

    Raises:
        InputError: a key or value is wrong; names file and line, or the command's option.
    """

    def in_section(loc: Loc) -> str:
        return where(("serve", *loc))

    try:
        ServeOptions.model_validate(section)
    except ValidationError as error:
        raise readable(error, ServeOptions, "section 'serve'", in_section) from error
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return ServeOptions.model_validate({**section, **given})
    except ValidationError as error:
        raise _wrong_option(error) from error


def _wrong_option(error: ValidationError) -> InputError:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    message = first["msg"].removeprefix("Input ")
    meaning = ServeOptions.model_fields[name].description or "see `fxgraft serve --help`"
    option = f"--{name.replace('_', '-')}"
    return InputError(f"option {option} is {first['input']!r}: it {_lower(message)}", meaning)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
