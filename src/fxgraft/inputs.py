"""Binding call arguments to a Program's inputs, and drawing random valid ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from fxgraft import images
from fxgraft.errors import InputError

if TYPE_CHECKING:
    from fxgraft.program import Input, Program

_EXAMPLE_SIZES = {"batch": 2, "sequence": 13}
_OTHER_SIZE = 5


def bind(
    program: Program, args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor | None]
) -> list[torch.Tensor]:
    """See :meth:`fxgraft.Program.bind`."""
    names = [spec.name for spec in program.inputs]
    if len(args) > len(names):
        raise InputError(
            f"{len(args)} inputs given, the Program takes {len(names)}",
            f"its inputs are: {', '.join(names)}",
        )
    given: dict[str, torch.Tensor] = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        program.input(name)
        if name in given:
            raise InputError(f"input {name!r} is given twice", "pass it once")
        if value is not None:
            given[name] = value
    sizes: dict[str, int] = {}
    for spec in program.inputs:
        if spec.name in given:
            _check(spec, given[spec.name], sizes)
    for name, size in sizes.items():
        _check_range(program, name, size)
    return [_cast(spec, given[spec.name]) if spec.name in given else _default(program, spec, sizes)
            for spec in program.inputs]  # fmt: skip


def _check(spec: Input, value: torch.Tensor, sizes: dict[str, int]) -> None:
    """Check a value against its description and the sizes found so far; note its own."""
    wanted = " x ".join(str(size) for size in spec.shape)
    if not isinstance(value, torch.Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"input {spec.name!r} is a {type(value).__name__}", f"give a tensor [{wanted}]"
        )
    if value.dtype.is_floating_point != spec.dtype.is_floating_point:
        raise InputError(f"input {spec.name!r} is {value.dtype}", f"give it as {spec.dtype}")
    if value.dim() != len(spec.shape):
        raise InputError(
            f"input {spec.name!r} has shape {tuple(value.shape)}", f"give it as [{wanted}]"
        )
    if value.numel() == 0:
        raise InputError(f"input {spec.name!r} is empty", f"give at least one element: [{wanted}]")
    for size, found in zip(spec.shape, value.shape, strict=True):
        expected = sizes.setdefault(size, found) if isinstance(size, str) else size
        if found != expected:
            detail = f" with {size}={expected}" if isinstance(size, str) else ""
            raise InputError(
                f"input {spec.name!r} has shape {tuple(value.shape)}",
                f"give it as [{wanted}]{detail}",
            )
    wanted_value = spec.fixed_value() if spec.fixed else None
    if wanted_value is not None and not torch.equal(_cast(spec, value.cpu()), wanted_value):
        found, captured = (cast(Any, one).tolist() for one in (value, wanted_value))
        raise InputError(
            f"input {spec.name!r} is {found}, the model was captured for {captured}",
            "give images of these sizes, or capture the model with an example of the others",
        )


def _check_range(program: Program, name: str, size: int) -> None:
    allowed = program.dimensions[name]
    if size < allowed.minimum or size > (allowed.maximum or size):
        raise InputError(
            f"dimension {name!r} has size {size}; the model was captured for "
            f"{allowed.minimum} to {allowed.maximum or 'any size'}",
            "give inputs of such a size, or capture the model with an example of this size",
        )


def _cast(spec: Input, value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == spec.dtype else value.to(spec.dtype)


def _default(program: Program, spec: Input, sizes: Mapping[str, int]) -> torch.Tensor:
    if spec.fixed:
        return spec.fixed_value(program.device)
    if spec.default == "required" or any(isinstance(s, str) and s not in sizes for s in spec.shape):
        wanted = " x ".join(str(size) for size in spec.shape)
        raise InputError(f"input {spec.name!r} is missing", f"give it as a tensor [{wanted}]")
    shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
    if spec.default == "ones":
        return torch.ones(shape, dtype=spec.dtype, device=program.device)
    if spec.default in ("zeros", "prompts"):
        return torch.zeros(shape, dtype=spec.dtype, device=program.device)
    row = torch.arange(shape[-1], dtype=spec.dtype, device=program.device)
    return row.expand(shape)


def example(program: Program, seed: int, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """See :meth:`fxgraft.Program.example`."""
    for name in sizes:
        if name not in program.dimensions:
            known = ", ".join(program.dimensions)
            raise InputError(f"no dynamic dimension {name!r}", f"the dimensions are: {known}")
    generator = torch.Generator().manual_seed(seed)
    values = {spec.name: _random(program, spec, sizes, generator) for spec in program.inputs}
    if "input_ids" in values:
        images.write_tokens(program, values["input_ids"])
    return {name: value.to(program.device) for name, value in values.items()}


def _random(
    program: Program, spec: Input, sizes: Mapping[str, int], generator: torch.Generator
) -> torch.Tensor:
    if spec.fixed:
        return spec.fixed_value()
    shape = [_size(program, size, sizes) for size in spec.shape]
    if spec.default == "positions":
        return torch.arange(shape[-1], dtype=spec.dtype).expand(shape)
    if spec.default in ("ones", "zeros", "prompts"):
        return torch.full(shape, int(spec.default == "ones"), dtype=spec.dtype)
    if spec.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    if spec.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    return torch.randint(0, max(spec.high, 2), shape, generator=generator, dtype=spec.dtype)


def _size(program: Program, size: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    if size in sizes:
        return sizes[size]
    allowed = program.dimensions[size]
    wanted = max(_EXAMPLE_SIZES.get(size, _OTHER_SIZE), allowed.minimum)
    return min(wanted, allowed.maximum) if allowed.maximum else wanted
