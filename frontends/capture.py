"""``capture``: a module, hub id, folder, GGUF file or saved Program becomes a Program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from fxgraft import graph as graphs
from fxgraft.errors import InputError
from fxgraft.frontends import exporting, image_sizes, inputs, raising, sources, transformers_hooks
from fxgraft.program import Input, Program


def capture(
    model: nn.Module | Program | str | Path,
    example: Mapping[str, torch.Tensor] | tuple[torch.Tensor, ...] | None = None,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    model_class: str | None = None,
) -> Program:
    """Capture a model into one graph with dynamic batch and sequence.

    Args:
        model: an ``nn.Module`` (its mode and weights are not changed), the alias
            ``"smollm2-135m"``, a hub id, a local folder of a transformers model or of a saved
            Program, or a ``.gguf`` file.
        example: example inputs; needed for modules that are not transformers models. Sizes must
            be at least 2 where a dimension is dynamic.
        dynamic: names of dynamic dimensions per input, as ``{"x": {0: "batch"}}``. By default
            the batch dimension of every input, and the sequence dimension of token inputs; of
            token inputs only where the model is given sizes of images (``image_grid_thw``,
            ``image_sizes``), which are fixed to those of the example.
        model_class: name of the transformers class to load a hub id or folder with, for example
            ``"AutoModelForImageClassification"``; by default the class its configuration names.

    Returns:
        A Program whose graph holds ``aten`` and ``fxgraft`` ops only.

    Raises:
        InputError: the source does not exist or is damaged.
        CaptureError: the model has data-dependent control flow, or a dynamic dimension was lost;
            names the module and the source line.
    """
    if isinstance(model, Program):
        return model
    if isinstance(model, (str, Path)):
        if sources.is_program(model):
            program = Program.load(model)
            program.origin.pop("backend", None)
            return program
        loaded = sources.load(model, model_class)
        program = capture(loaded.model, example, dynamic=dynamic)
        loaded.fill(program)
        program.origin["source"] = loaded.name
        return program
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"argument 'model' is a {type(model).__name__}",
            "give an nn.Module, a hub id, a folder, a .gguf file or a Program",
        )
    return _capture_module(model, example, dynamic)


def _capture_module(
    model: nn.Module,
    example: Mapping[str, torch.Tensor] | tuple[torch.Tensor, ...] | None,
    dynamic: Mapping[str, Mapping[int, str]] | None,
) -> Program:
    specs = inputs.describe(model, example, dynamic)
    values = inputs.example_values(model, specs, example)
    if not transformers_hooks.is_transformers(model):
        return raising.raise_ops(exporting.export(model, specs, values))
    with image_sizes.fixed(model, specs) as constants:
        program = _capture_transformers(
            model,
            tuple(spec for spec in specs if not spec.fixed),
            {spec.name: values[spec.name] for spec in specs if not spec.fixed},
        )
    for name, weight in list(program.weights()):
        if weight.is_meta and name in constants:
            graphs.set_weight(program.graph_module, name, constants[name])
    image_sizes.add_inputs(program, specs)
    return program


def _capture_transformers(
    model: nn.Module, specs: tuple[Input, ...], values: Mapping[str, torch.Tensor]
) -> Program:
    try:
        with transformers_hooks.emit_ops(model):
            program = raising.raise_ops(exporting.export(model, specs, values))
        if not raising.has_loose_masks(program):
            return program
    except transformers_hooks.UnknownAttentionError:
        pass
    # The model makes scores of its own, or passes more than the op takes; its attention is
    # captured as it is written, with masks in its own format.
    with transformers_hooks.emit_recurrences(model):
        return raising.raise_ops(exporting.export(model, specs, values))


__all__ = ["Input", "capture"]
