"""The bodies of requests: OpenAI's fields, the usual further ones, and ``inputs``.

A field that would change the answer and is not supported is refused unless it has its neutral
value; fields that cannot change it (``user``, ``metadata``) are accepted; unknown ones are refused
as OpenAI refuses them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
)

_UNSUPPORTED = "is not supported by this server"
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
MAX_STOPS = 16


class StreamOptions(BaseModel):
    """What a stream has beside its text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Generation(BaseModel):
    """The fields of both kinds of requests."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    n: int | None = Field(default=None, ge=1, le=128)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    inputs: dict[str, float | str] | None = None

    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("frequency_penalty", "presence_penalty", "logit_bias")
    @classmethod
    def _is_neutral(cls, value: object) -> object:
        if value:
            raise ValueError(_UNSUPPORTED)
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def limit(self) -> int | None:
        """Most new tokens, None: not said."""
        return self.max_tokens


class CompletionRequest(Generation):
    """The body of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    logprobs: int | None = None

    @field_validator("suffix", "best_of")
    @classmethod
    def _is_absent(cls, value: object) -> object:
        if value not in (None, "", 1):
            raise ValueError(_UNSUPPORTED)
        return value

    @field_validator("logprobs")
    @classmethod
    def _has_no_logprobs(cls, value: int | None) -> int | None:
        if value is not None:
            raise ValueError(_UNSUPPORTED)
        return value


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ImageAddress(BaseModel):
    """Where an image is: it is sent in the address itself."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: str
    detail: Literal["auto"] | None = None


class ImagePart(BaseModel):
    """An image in a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["image_url"]
    image_url: ImageAddress


def _content_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "<text>"
    return "<parts>" if isinstance(value, list) else None


def _part_kind(value: object) -> str | None:
    kind = cast("dict[str, object]", value).get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if isinstance(kind, str) else None


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    Discriminator(
        _part_kind,
        custom_error_type="part",
        custom_error_message="should be an object whose type is 'text' or 'image_url'",
    ),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<parts>")],
    Discriminator(
        _content_kind,
        custom_error_type="content",
        custom_error_message="should be a text or a list of parts",
    ),
]


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_call_id: str | None = None
    refusal: None = None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content in parts."""
        if isinstance(self.content, list):
            return self.content
        return [TextPart(type="text", text=self.content)] if self.content else []

    @property
    def text(self) -> str:
        """The content as one text, without images."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def head(self) -> dict[str, str]:
        """Role and name, as chat templates know them."""
        # Templates of open models know no developer; it is what OpenAI calls the system since.
        role = "system" if self.role == "developer" else self.role
        return {"role": role, **({} if self.name is None else {"name": self.name})}


class ResponseFormat(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]


class ChatRequest(Generation):
    """The body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None

    @field_validator("logprobs", "top_logprobs", "tools")
    @classmethod
    def _is_absent(cls, value: object) -> object:
        if value:
            raise ValueError(_UNSUPPORTED)
        return value

    @property
    def limit(self) -> int | None:
        """Most new tokens, None: not said."""
        return self.max_completion_tokens or self.max_tokens
