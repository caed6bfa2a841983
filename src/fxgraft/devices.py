"""Descriptions of devices: peak rates, bandwidths, capacities, with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from fxgraft.element_types import BITS
from fxgraft.errors import InputError
from fxgraft.validation import nowhere, readable, suggestion

_FILE = Path(__file__).with_name("devices.yaml")


def _number(value: object) -> object:
    """YAML reads ``1e9`` as text; numbers in other text stay what they are and are refused."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Rate = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Time = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Link(_Record):
    """What joins devices: bytes per second and direction, seconds."""

    bandwidth: Rate
    latency: Time


class Device(_Record):
    """One device.

    Attributes:
        name: of the device.
        operations: dense matrix operations per second by data type.
        vector: other operations per second.
        memory: bytes.
        bandwidth: bytes per second of that memory.
        link: to other devices, None if it has none.
        watts: thermal design power.
        launch: seconds that each kernel adds.
        step: seconds that each step adds.
        sources: where the figures come from.
    """

    name: str = ""
    operations: dict[str, Rate]
    vector: Rate
    memory: Rate
    bandwidth: Rate
    link: Link | None = None
    watts: Rate
    launch: Time = 0.0
    step: Time = 0.0
    sources: dict[str, str] = {}

    @field_validator("operations")
    @classmethod
    def _known_types(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(value) - set(BITS))
        if unknown or not value:
            raise ValueError(f"has no data type, or unknown ones: {', '.join(unknown)}")
        return value

    def peak(self, name: str) -> float:
        """Matrix operations per second in a data type.

        Raises:
            InputError: the device does not compute in it.
        """
        if name not in self.operations:
            raise InputError(
                f"device {self.name!r} has no peak rate for {name}",
                f"its data types are: {', '.join(self.operations)}",
            )
        return self.operations[name]


def device(value: Device | Mapping[str, Any] | str) -> Device:
    """A device by name, from a mapping of its fields, or as it is.

    Raises:
        InputError: the name is unknown (lists the names), or a field is missing, unknown, zero,
            negative or no number.
    """
    if isinstance(value, Device):
        return value
    if isinstance(value, str):
        known = devices()
        if value not in known:
            raise InputError(
                f"there is no device {value!r}{suggestion(value, known)}",
                f"the devices are: {', '.join(known)}; or give a mapping of fields",
            )
        return known[value]
    return _parse(value, str(value.get("name", "the device")))


@cache
def devices() -> dict[str, Device]:
    """All devices of ``devices.yaml`` by name."""
    content = cast("dict[str, dict[str, Any]]", yaml.safe_load(_FILE.read_text(encoding="utf-8")))
    return {name: _parse({"name": name, **fields}, name) for name, fields in content.items()}


def _parse(fields: Mapping[str, Any], name: str) -> Device:
    try:
        return Device(**fields)
    except ValidationError as error:
        raise readable(error, Device, f"device {name!r}", nowhere) from error
