"""From a compiled model to a server that is ready for requests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI

from fxgraft.backend import Compiled, find_backend
from fxgraft.runtime.engine import Engine, LayerPolicy
from fxgraft.runtime.serve.app import create_app
from fxgraft.runtime.serve.model import ServedModel, layer_facts
from fxgraft.runtime.serve.options import ServeOptions


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
) -> FastAPI:
    """A server over a compiled causal language model.

    Args:
        compiled: lowered by a backend that runs paged graphs.
        tokenizer: of transformers; its chat template is used for chats.
        name: of the model in requests, unless the options have a ``served_name``.
        options: limits, timeouts, and those of the engine.
        keys: API keys; none lets in everybody.
        policy: changes ops of running requests.

    Raises:
        LoweringError: the backend cannot run paged graphs.
        StateError: the model cannot generate with explicit state.
        InputError: the memory is too little for one request.

    Example:
        >>> app = app_of(compiled, tokenizer, name="smollm2-135m")
        >>> serve(app, ServeOptions(), print)
    """
    chosen = options or ServeOptions()
    engine = Engine(compiled, chosen.engine, tokenizer=tokenizer, policy=policy)
    engine.warm_up()
    layers, op_layers = layer_facts(compiled.program)
    model = ServedModel(
        chosen.served_name or name,
        source=str(compiled.program.origin.get("source") or ""),
        backend=compiled.backend,
        passes=tuple(record.name for record in compiled.program.history),
        context_length=engine.max_context,
        layers=layers,
        op_layers=op_layers,
    )
    return create_app(engine, tokenizer, model, chosen, keys)
