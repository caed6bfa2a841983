"""Which inputs a model is captured with, and their dynamic dimensions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from fxgraft.errors import InputError
from fxgraft.frontends import transformers_hooks
from fxgraft.frontends.image_sizes import SIZE_INPUTS
from fxgraft.program import Default, Input

_BATCH, _SEQUENCE = 3, 11
_TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids",
                 "mm_token_type_ids")  # fmt: skip
_DECODER_INPUTS = ("decoder_input_ids", "decoder_attention_mask")
_DEFAULTS: dict[str, Default] = {
    "attention_mask": "ones",
    "decoder_attention_mask": "ones",
    "position_ids": "positions",
    "token_type_ids": "zeros",
    "mm_token_type_ids": "zeros",
}
# Models whose token type 0 is a prompt, read in both directions, and 1 an answer, read in one.
_TYPES_ARE_PROMPTS = frozenset({"paligemma"})


def describe(
    model: nn.Module,
    example: Mapping[str, torch.Tensor] | tuple[torch.Tensor, ...] | None,
    dynamic: Mapping[str, Mapping[int, str]] | None,
) -> tuple[Input, ...]:
    """The inputs to capture with: from the example, or a transformers model's usual ones.

    Raises:
        InputError: no example for a module whose inputs are not known, or one that does not fit.
    """
    if example is None:
        if dynamic is not None:
            raise InputError("argument 'dynamic' is given without 'example'", "give both")
        return _known_inputs(model)
    values = named(model, example)
    _check_dynamic(values, dynamic or {})
    fixed = _size_inputs(model, values)
    if dynamic is None and fixed:
        dynamic = {name: {0: "batch", 1: "sequence"} for name in _TOKEN_INPUTS if name in values}
    return tuple(
        _fixed_value(name, value, dynamic)
        if name in fixed
        else _describe_value(model, name, value, dynamic)
        for name, value in values.items()
    )


def _size_inputs(model: nn.Module, values: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """The inputs that the model reads as Python numbers."""
    known = SIZE_INPUTS if transformers_hooks.is_transformers(model) else ()
    return frozenset(known) & values.keys()


def _fixed_value(
    name: str, value: torch.Tensor, dynamic: Mapping[str, Mapping[int, str]] | None
) -> Input:
    if (dynamic or {}).get(name):
        raise InputError(
            f"argument 'dynamic' names input {name!r}, whose values are fixed at capture",
            "leave it out: the model reads the sizes of images as numbers",
        )
    if value.dtype.is_floating_point or value.dim() != 2 or not value.numel():
        raise InputError(
            f"example input {name!r} is {value.dtype} of shape {tuple(value.shape)}",
            "give whole numbers, a row per image",
        )
    flat = cast("list[int]", cast(Any, value.flatten()).tolist())
    return Input(name, value.dtype, tuple(value.shape), fixed=tuple(flat))


def named(
    model: nn.Module, example: Mapping[str, torch.Tensor] | tuple[torch.Tensor, ...]
) -> dict[str, torch.Tensor]:
    """Example values by the parameter names of the model's ``forward``.

    Raises:
        InputError: they are no tensors, or ``forward`` cannot be called with them.
    """
    signature = inspect.signature(model.forward)
    try:
        if isinstance(example, Mapping):
            signature.bind(**example)
            values = dict(example)
        elif isinstance(example, (tuple, list)):  # pyright: ignore[reportUnnecessaryIsInstance]
            values = dict(signature.bind(*example).arguments)
        else:
            raise InputError(
                f"argument 'example' is a {type(example).__name__}",
                "give a tuple of tensors, or tensors by name: {'x': torch.randn(2, 3)}",
            )
    except TypeError as error:
        raise InputError(
            f"argument 'example' does not fit {type(model).__name__}.forward: {error}",
            f"its parameters are: {', '.join(signature.parameters)}",
        ) from error
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"example input {name!r} is a {type(value).__name__}", "give a tensor")
    return values


def _check_dynamic(
    values: Mapping[str, torch.Tensor], dynamic: Mapping[str, Mapping[int, str]]
) -> None:
    for name, axes in dynamic.items():
        if name not in values:
            raise InputError(
                f"argument 'dynamic' names {name!r}, which is no input of the example",
                f"the example's inputs are: {', '.join(values)}",
            )
        count = values[name].dim()
        wrong = [axis for axis in axes if axis not in range(count)]
        if wrong:
            raise InputError(
                f"argument 'dynamic' names axis {wrong[0]} of input {name!r}, which has {count} "
                "dimensions",
                f"give axes from 0 to {count - 1}",
            )


def _describe_value(
    model: nn.Module,
    name: str,
    value: torch.Tensor,
    dynamic: Mapping[str, Mapping[int, str]] | None,
) -> Input:
    if dynamic is not None:
        names = dict(dynamic.get(name, {}))
    elif name in _TOKEN_INPUTS:
        names = {0: "batch", 1: "sequence"}
    elif name in _DECODER_INPUTS:
        names = {0: "batch", 1: "decoder_sequence"}
    else:
        names = {0: "batch"} if value.dim() else {}
    shape = tuple(names.get(axis, size) for axis, size in enumerate(value.shape))
    for axis, size in enumerate(value.shape):
        if axis in names and size < 2:
            raise InputError(
                f"example input {name!r} has size {size} in the dynamic dimension {names[axis]!r}",
                "give at least 2 there, so that the size is not taken for a constant",
            )
    high = 0
    if not value.dtype.is_floating_point and value.dtype != torch.bool:
        high = vocabulary(model) if name.endswith("input_ids") else int(value.max()) + 1
    return Input(name, value.dtype, shape, _default_of(model, name), high)


def _default_of(model: nn.Module, name: str) -> Default:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if name == "token_type_ids" and kind in _TYPES_ARE_PROMPTS:
        return "prompts"
    return _DEFAULTS.get(name, "required")


def _known_inputs(model: nn.Module) -> tuple[Input, ...]:
    parameters = inspect.signature(model.forward).parameters
    if getattr(model, "config", None) is None or "input_ids" not in parameters:
        raise InputError(
            f"the inputs of {type(model).__name__} are not known",
            "give example inputs: capture(model, example={'x': torch.randn(2, 3)})",
        )
    names = ["input_ids", "attention_mask"]
    if "position_ids" in parameters:
        names.append("position_ids")
    if cast(Any, model).config.is_encoder_decoder:
        names = ["input_ids", "attention_mask", "decoder_input_ids"]
    specs: list[Input] = []
    for name in names:
        if name not in parameters:
            continue
        axis = "decoder_sequence" if name.startswith("decoder") else "sequence"
        high = vocabulary(model) if name.endswith("input_ids") else 0
        default = _DEFAULTS.get(name, "required")
        specs.append(Input(name, torch.int64, ("batch", axis), default, high))
    return tuple(specs)


def example_values(
    model: nn.Module,
    specs: tuple[Input, ...],
    example: Mapping[str, torch.Tensor] | tuple[torch.Tensor, ...] | None,
) -> dict[str, torch.Tensor]:
    """Concrete inputs on the model's device for the capture itself."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if example is not None:
        return {name: value.to(device) for name, value in named(model, example).items()}
    sizes = {"batch": _BATCH, "sequence": _SEQUENCE, "decoder_sequence": _SEQUENCE - 4}
    values: dict[str, torch.Tensor] = {}
    for spec in specs:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        if spec.default == "positions":
            values[spec.name] = torch.arange(shape[-1], device=device).repeat(shape[0], 1)
        else:
            values[spec.name] = torch.ones(shape, dtype=spec.dtype, device=device)
    return values


def vocabulary(model: nn.Module) -> int:
    """Number of token ids the model accepts."""
    get_embeddings = getattr(model, "get_input_embeddings", None)
    try:
        table = get_embeddings() if get_embeddings else None
    except (NotImplementedError, AttributeError):
        table = None
    weight = getattr(table, "weight", None)
    if isinstance(weight, torch.Tensor):
        return int(weight.shape[0])
    config = getattr(model, "config", None)
    return int(getattr(config, "vocab_size", 0) or 0)
