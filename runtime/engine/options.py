"""Options of the engine."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fxgraft.errors import InputError


class EngineOptions(BaseModel):
    """How many requests run at once, and with how much memory.

    Attributes:
        max_batch: most requests that run at once; others wait.
        chunk_tokens: most prompt tokens taken in per step, so that prompts do not hold up
            requests that are generating.
        block_size: tokens per block of growing state.
        memory_bytes: for state, in bytes; None: on a GPU 90 % of what is free, else 1 GiB.
        max_context: most tokens of prompt and answer together; None: the model's.
        prefix_reuse: keep state of prompts, and use it for requests that begin alike.
        snapshots: copies of fixed-size state kept for prefix reuse.
        lookahead: launch a step before the tokens of the last one are read, so that the device
            never waits; None: on a GPU.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    max_batch: int = Field(default=64, ge=1)
    chunk_tokens: int = Field(default=512, ge=1)
    block_size: int = Field(default=16, ge=1)
    memory_bytes: int | None = Field(default=None, ge=1)
    max_context: int | None = Field(default=None, ge=2)
    prefix_reuse: bool = True
    snapshots: int = Field(default=16, ge=0)
    lookahead: bool | None = None

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Options from keyword arguments.

        Raises:
            InputError: a value is out of range or a name is unknown.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            wrong = error.errors()[0]
            raise InputError(
                f"engine option {'.'.join(map(str, wrong['loc']))!r}: {wrong['msg']}",
                f"the options are: {', '.join(cls.model_fields)}",
            ) from error
