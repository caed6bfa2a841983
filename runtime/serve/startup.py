"""From a compiled model to a server that is ready for requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from fxgraft.backend import Compiled, find_backend
from fxgraft.errors import InputError
from fxgraft.runtime.dsla_serve import DslaServe
from fxgraft.runtime.engine import Engine, LayerPolicy
from fxgraft.runtime.serve.app import create_app
from fxgraft.runtime.serve.image_chats import ImageChats
from fxgraft.runtime.serve.model import ServedModel, layer_facts
from fxgraft.runtime.serve.options import ServeOptions
from fxgraft.stepping import ProgramFacts


def serving_backend(name: str) -> str:
    """The backend that serves: ``auto`` is ``triton`` where that works, else ``torch``.

    The engine needs paged graphs, which the backends that ``auto`` usually tries may not run.
    """
    if name != "auto":
        return name
    return "triton" if find_backend("triton").available() is None else "torch"


def app_of(
    compiled: Compiled,
    tokenizer: Any,
    *,
    name: str,
    options: ServeOptions | None = None,
    keys: Iterable[str] = (),
    policy: LayerPolicy | None = None,
    processor: Any = None,
) -> FastAPI:
    """A server over a compiled causal language model.

    Args:
        compiled: lowered by a backend that runs paged graphs.
        tokenizer: of transformers; its chat template is used for chats.
        name: of the model in requests, unless the options have a ``served_name``.
        options: limits, timeouts, and those of the engine.
        keys: API keys; none lets in everybody.
        policy: changes ops of running requests; default what the options' ``dsla`` says.
        processor: of transformers, turns images into the model's inputs; default the one that
            belongs to the model's source. A model that takes images and has none refuses them.

    Raises:
        LoweringError: the backend cannot run paged graphs.
        StateError: the model cannot generate with explicit state.
        InputError: the memory is too little for one request.

    Example:
        >>> app = app_of(compiled, tokenizer, name="smollm2-135m")
        >>> serve(app, ServeOptions(), print)
    """
    chosen = options or ServeOptions()
    policy = policy or _policy(compiled, chosen)
    engine = Engine(compiled, chosen.engine, tokenizer=tokenizer, policy=policy)
    engine.warm_up()
    layers, op_layers = layer_facts(compiled.language_model)
    model = ServedModel(
        chosen.served_name or name,
        source=str(compiled.program.origin.get("source") or ""),
        backend=compiled.backend,
        passes=tuple(record.name for record in compiled.program.history),
        context_length=engine.max_context,
        layers=layers,
        op_layers=op_layers,
    )
    images = ImageChats.of_program(compiled.program, processor)
    return create_app(engine, tokenizer, model, chosen, keys, images)


def _policy(compiled: Compiled, options: ServeOptions) -> LayerPolicy | None:
    """The policy of the ``dsla`` section, if there is one.

    Raises:
        InputError: the model has no layers to convert, its longest request is not known, or the
            log cannot be written.
    """
    if options.dsla is None:
        return None
    context = options.max_context or ProgramFacts(compiled.program).context_length
    if context is None:
        raise InputError("the model does not say how long its context is", "set max_context")
    log = None if options.dsla_log is None else _appender(Path(options.dsla_log))
    return DslaServe(compiled.program, options.dsla, context, log)


def _appender(path: Path) -> Callable[[str], object]:
    """Appends lines to a file."""
    try:
        file = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise InputError(
            f"key 'dsla_log': {path} cannot be written: {error.strerror}",
            "give a file in a folder that you may write to",
        ) from error
    return lambda line: file.write(f"{line}\n")
