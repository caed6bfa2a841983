"""``fxgraft serve``: answer requests over HTTP with a pipeline file's model."""

from __future__ import annotations

import gc
import importlib.util
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

import fxgraft
from fxgraft import sources
from fxgraft.backend import find_backend
from fxgraft.cli.console import messages, output, step
from fxgraft.cli.reading import read
from fxgraft.errors import Error, InputError
from fxgraft.pipeline import PipelineFile
from fxgraft.transform import apply

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    pipeline: Annotated[Path, typer.Argument(help="Pipeline file (.yaml).")],
    model: Annotated[
        str | None, typer.Option(help="Model instead of the file's: alias, hub id or path.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Backend instead of the file's.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    served_name: Annotated[str | None, typer.Option(help="Name of the model in requests.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Sequences that run at once.")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Sequences that wait beside them.")] = None,
    max_context: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer together.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="New tokens of one answer.")] = None,
    memory_bytes: Annotated[int | None, typer.Option(help="Memory for state, in bytes.")] = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds after which a request is ended.")
    ] = None,
    grace_period: Annotated[
        float | None, typer.Option(help="Seconds for running requests after SIGTERM.")
    ] = None,
) -> None:
    """Serve a pipeline file's model: OpenAI's HTTP interface, metrics and a status page."""
    _check_packages()
    from fxgraft.runtime.serve import keys, options, server, startup

    file = PipelineFile.read(pipeline)
    changes = {
        "host": host, "port": port, "served_name": served_name, "max_batch": max_batch,
        "max_queue": max_queue, "max_context": max_context, "max_tokens": max_tokens,
        "memory_bytes": memory_bytes, "request_timeout": request_timeout,
        "grace_period": grace_period,
    }  # fmt: skip
    chosen = options.read_options(file.serve, changes, file.where)
    allowed = keys.keys_from_environment()
    source = model or file.model
    if source is None:
        raise InputError(f"{pipeline} names no model", "add `model: smollm2-135m`, or use --model")
    name = startup.serving_backend(backend or file.backend)
    find_backend(name).check_options(file.options)
    server.listen(chosen.host, chosen.port).close()
    compiled, tokenizer = _prepare(file, source, name)
    with step("prepare the engine"):
        app = startup.app_of(compiled, tokenizer, name=_name(source), options=chosen, keys=allowed)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # What was built stays: collections that walk over it would only hold up requests.
    gc.collect()
    gc.freeze()
    if not allowed:
        messages.print(f"  everybody may ask: {keys.VARIABLE} is not set", highlight=False)
    server.serve(app, chosen, _announce)


def _name(source: str) -> str:
    """An alias or hub id as it is, the last part of a path."""
    return Path(source).resolve().name if Path(source).exists() else source


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise Error(
            f"the server needs packages that are not installed: {', '.join(missing)}",
            "run: pip install 'fxgraft[serve]'",
        )


def _prepare(file: PipelineFile, source: str, backend: str) -> tuple[fxgraft.Compiled, Any]:
    program = read(source)
    tokenizer = sources.tokenizer(program.origin.get("source") or source)
    file.pipeline.validate(program)
    for item in file.pipeline.passes:
        with step(f"pass {item.name}"):
            program = apply(program, item)
    return fxgraft.compile(program, backend=backend, options=file.options), tokenizer


def _announce(address: str) -> None:
    output.print(f"serving on {address}", highlight=False, soft_wrap=True)
    output.file.flush()
