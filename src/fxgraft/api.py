"""The public functions: the only part of the core that knows frontends and backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxgraft import auto
from fxgraft.backend import Compiled, find_backend
from fxgraft.errors import InputError, LoweringError
from fxgraft.frontends import capture
from fxgraft.pipeline import PassSpec, Pipeline, Progress
from fxgraft.program import Program

__all__ = ["capture", "compile", "export_onnx", "load"]


def compile(
    model: nn.Module | Program | str | Path,
    passes: Pipeline | Sequence[PassSpec] | str | Path = (),
    *,
    backend: str = "auto",
    options: Mapping[str, Any] | None = None,
    example: Mapping[str, torch.Tensor] | tuple[torch.Tensor, ...] | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> Compiled:
    """Capture a model, rewrite it with passes, and lower it.

    Args:
        model: anything that :func:`fxgraft.capture` takes; it is not changed.
        passes: pass instances, names, ``{name: {field: value}}``, or the path of a YAML pipeline.
        backend: ``"torch"``, ``"onnx"``, another installed backend, or ``"auto"``: the one that
            decodes fastest on this machine of those whose results agree.
        options: options of the backend.
        example: example inputs, for modules that are not transformers models.
        check: run the numeric check after each pass.
        progress: told of each pass before it runs.

    Raises:
        CaptureError: the model cannot be captured.
        InputError: an argument, a pass setting or a pipeline file is wrong.
        ContractError: the passes cannot be combined like this.
        NumericError: a pass changed the outputs by more than it may.
        LoweringError: the backend cannot run the result.

    Example:
        >>> compiled = fxgraft.compile("smollm2-135m", passes=["optimize"])
        >>> compiled.generate(input_ids, max_new_tokens=64)
    """
    pipeline = Pipeline.parse(passes)
    if backend != "auto":
        find_backend(backend)
    program = capture(model, example)
    program = pipeline.run(program, progress=progress, check=check)
    if backend == "auto":
        return auto.lower(program, dict(options or {}))
    chosen = find_backend(backend)
    missing = chosen.available()
    if missing is not None:
        raise LoweringError(f"backend {backend!r} cannot be used: {missing}", "use backend 'torch'")
    return chosen.lower(program, **dict(options or {}))


def export_onnx(
    model: Compiled | Program, folder: str | Path, *, opset: int | None = None, **options: Any
) -> Path:
    """Write a model as ONNX files that plain onnxruntime runs.

    Language models become ``prefill.onnx`` and ``decode.onnx`` with past and present; other models
    ``model.onnx``. The result is run in onnxruntime at two batch sizes and two lengths and
    compared before this returns.

    Args:
        model: a compiled model or a Program.
        folder: is created; an existing one is replaced only when all is well.
        opset: ONNX opset, default the backend's.
        options: other options of the backend ``onnx``.

    Returns:
        The folder.

    Raises:
        LoweringError: an op has no ONNX form (names it), or the check failed.
    """
    program = model.program if isinstance(model, Compiled) else model
    backend = find_backend("onnx")
    missing = backend.available()
    if missing is not None:
        raise LoweringError(f"ONNX export cannot be used: {missing}", "pip install 'fxgraft[onnx]'")
    if opset is not None:
        options["opset"] = opset
    return backend.export(program, Path(folder), **options)


def load(folder: str | Path) -> Program | Compiled:
    """Read what ``Program.save`` or ``Compiled.save`` wrote; nothing from the file is executed.

    Raises:
        SerializationError: the folder is no saved Program, is damaged, or is of a newer version.
        InputError: it was lowered by a backend that is not installed here.
    """
    program = Program.load(folder)
    saved = program.origin.pop("backend", None)
    if saved is None:
        return program
    if not isinstance(saved, dict) or "name" not in saved:
        raise InputError(f"{folder} names no backend", "load it with Program.load")
    return find_backend(str(saved["name"])).lower(program, **saved.get("options", {}))
