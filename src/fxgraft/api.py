"""The public functions: the only part of the core that knows frontends and backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fxgraft import auto
from fxgraft.backend import Compiled, backend_names, find_backend
from fxgraft.errors import InputError, LoweringError, SerializationError
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
    lower = _lowering(backend, {} if options is None else options)
    program = capture(model, example)
    program = pipeline.run(program, progress=progress, check=check)
    return lower(program)


def _lowering(backend: str, options: Mapping[str, Any]) -> Callable[[Program], Compiled]:
    """How to lower with a backend, refused here if that cannot work on this machine."""
    if not isinstance(options, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"argument 'options' is a {type(options).__name__}", "give {'option': value}"
        )
    if backend == "auto":
        if options:
            raise InputError(
                f"options {sorted(options)} were given with backend 'auto'",
                f"name the backend: {', '.join(backend_names())}",
            )
        return auto.lower
    chosen = find_backend(backend)
    missing = chosen.available()
    if missing is not None:
        raise LoweringError(f"backend {backend!r} cannot be used: {missing}", "use backend 'torch'")
    chosen.check_options(options)
    return lambda program: chosen.lower(program, **options)


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
        InputError: the model was not captured yet.
    """
    program = model.program if isinstance(model, Compiled) else model
    if not isinstance(program, Program):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"argument 'model' is a {type(model).__name__}",
            "give a compiled model, or what fxgraft.capture returns",
        )
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
        InputError: it was lowered by a backend that does not exist here.
        LoweringError: that backend cannot be used on this machine.
    """
    if not isinstance(folder, (str, Path)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"argument 'folder' is a {type(folder).__name__}", "give a path")
    program = Program.load(folder)
    saved = program.origin.pop("backend", None)
    if saved is None:
        return program
    if not isinstance(saved, Mapping) or set(cast(Any, saved)) != {"name", "options"}:
        raise SerializationError(
            f"{folder} names no backend and options, but {saved!r}", "load it with Program.load"
        )
    found = cast("Mapping[str, Any]", saved)
    return _lowering(found["name"], found["options"])(program)
