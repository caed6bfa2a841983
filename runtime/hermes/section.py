"""What the sections of a system file have in common: strict keys, and kinds of number."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo


class Section(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Count = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]
Number = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]


def _from_folder(value: Any, info: ValidationInfo) -> Any:
    """Relative paths start at the folder of the system file."""
    if not isinstance(value, (str, Path)):
        raise ValueError("should be the path of a file")
    context = cast("dict[str, Path | None]", info.context or {})
    folder = context.get("folder")
    return folder / value if folder else Path(value)


File = Annotated[Path, BeforeValidator(_from_folder)]


def tagged(value: Any, kind: str, key: str) -> Any:
    """Write a short form out: a bare value stands for ``{kind: ..., key: value}``."""
    whole: Any = value
    is_short = value is not None and not isinstance(value, (dict, BaseModel))
    return {"kind": kind, key: whole} if is_short else whole


def default_kind(value: Any, kind: str) -> Any:
    """A mapping without ``kind`` is of this one."""
    if isinstance(value, dict) and "kind" not in value:
        return {"kind": kind, **cast("dict[str, Any]", value)}
    return cast(Any, value)
