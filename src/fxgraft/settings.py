"""``Settings``: typed settings of a pass or an offline stage, from Python, YAML or JSON."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from fxgraft.validation import Where, located, nowhere, readable, resolve_paths


class Settings(BaseModel):
    """Frozen fields; an unknown or wrong one is an ``InputError`` that names the valid ones.

    Attributes:
        name: what the settings belong to, for messages.
        role: the kind of thing that ``name`` is, for messages.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    name: ClassVar[str]
    role: ClassVar[str]

    def config(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, object],
        *,
        where: Where = nowhere,
        folder: Path | None = None,
        strict: bool = False,
    ) -> Self:
        """Make one from its fields.

        Args:
            config: the fields.
            where: gives the place of a field in its source, for messages.
            folder: what relative paths are relative to.
            strict: take no value of another type, such as the text ``"3"`` for an integer.

        Raises:
            InputError: a field is unknown, missing or of the wrong type; names the valid ones.
        """
        values = resolve_paths(cls, config, folder) if folder is not None else dict(config)
        context = {"where": where}
        if not strict:
            return cls.model_validate(values, context=context)
        # JSON mode is strict about types and yet takes text for paths and lists for tuples.
        return cls.model_validate_json(json.dumps(values), strict=True, context=context)

    @model_validator(mode="wrap")
    @classmethod
    def _raise_readable(
        cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        where = cast("dict[str, Where]", info.context or {}).get("where", nowhere)
        if isinstance(data, dict):
            given = cast("dict[str, Any]", data)
            data = {name: _tuples(cls, name, value) for name, value in given.items()}
        try:
            with located(where(())):
                return handler(data)
        except ValidationError as error:
            raise readable(error, cls, f"{cls.role} {cls.name!r}", where) from error


def _tuples(model: type[BaseModel], name: str, value: Any) -> Any:
    """A field's value with lists turned into the tuples that it takes: YAML and JSON have none."""
    field = model.model_fields.get(name)
    return value if field is None else _tuple(field.annotation, value)


def _tuple(annotation: Any, value: Any) -> Any:
    kinds = [annotation, *typing.get_args(annotation)]
    kind = next((kind for kind in kinds if typing.get_origin(kind) is tuple), None)
    if kind is None or not isinstance(value, list):
        return value
    inner = typing.get_args(kind)
    items = cast("list[Any]", value)
    each = inner[:1] * len(items) if inner[1:] == (...,) else inner
    return tuple(map(_tuple, each, items)) if len(each) == len(items) else items
