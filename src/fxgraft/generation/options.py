"""The options of generation, checked once, in one place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Self, TypedDict, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fxgraft.errors import InputError

_LARGEST_SEED = 2**63 - 1


class SamplingKeywords(TypedDict, total=False):
    """The fields of ``SamplingOptions`` as keyword arguments; None means the default."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    eos_token_id: int | Sequence[int] | None
    stop_strings: str | Sequence[str] | None
    seed: int | None


class SamplingOptions(BaseModel):
    """How one row's tokens are chosen and when it ends.

    The names and their order of application are transformers': repetition penalty,
    ``min_new_tokens``, temperature, top-k, top-p, min-p. The last four only act when sampling.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    max_new_tokens: int = Field(default=128, ge=1, description="at least 1 token must be asked for")
    min_new_tokens: int = Field(
        default=0, ge=0, description="end-of-text tokens are barred before this many new tokens"
    )
    do_sample: bool = Field(
        default=False, description="draw from the distribution (true) or take its maximum (false)"
    )
    temperature: float = Field(
        default=1.0, gt=0, description="above 0; for greedy decoding use do_sample=False"
    )
    top_k: int = Field(default=0, ge=0, description="keep the k likeliest tokens; 0 keeps all")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="in (0, 1]: mass of likeliest tokens kept; 1 keeps all"
    )
    min_p: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="in [0, 1]: least probability kept, relative to the likeliest token",
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, description="above 0; 1 is none, larger values discourage repetition"
    )
    eos_token_id: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description="token ids that end a row; none given: the model's; []: none"
    )
    stop_strings: tuple[str, ...] = Field(
        default=(), description="non-empty texts; a row ends with the token that completes one"
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=_LARGEST_SEED,
        description="of the random numbers, from 0 to 2**63 - 1",
    )

    @field_validator("eos_token_id", "stop_strings", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        if isinstance(value, (int, str)):
            return (value,)
        return tuple(cast(Iterable[Any], value)) if isinstance(value, (list, set)) else value

    @field_validator("stop_strings")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty text would end every row at once")
        return value

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is over max_new_tokens={self.max_new_tokens}"
            )
        return self

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Options from keyword arguments; ``None`` means the default.

        Raises:
            InputError: a value is out of range or a name is unknown; says what is allowed.
        """
        try:
            return cls(**{name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            raise _as_input_error(error) from error

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is simply the likeliest one."""
        return not (self.do_sample or self.min_new_tokens) and self.repetition_penalty == 1.0


def _as_input_error(error: ValidationError) -> InputError:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return InputError(message, "make min_new_tokens the smaller one")
    name = str(first["loc"][0])
    if name not in SamplingOptions.model_fields:
        known = ", ".join(SamplingOptions.model_fields)
        return InputError(f"no generation option {name!r}", f"the options are: {known}")
    description = SamplingOptions.model_fields[name].description
    return InputError(f"option {name}={first['input']!r}: {message}", f"{name}: {description}")
