"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterable
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fxgraft.runtime.engine import Engine
from fxgraft.runtime.serve import status
from fxgraft.runtime.serve.image_chats import ImageChats
from fxgraft.runtime.serve.keys import KeyCheck
from fxgraft.runtime.serve.metrics import Metrics
from fxgraft.runtime.serve.model import ServedModel
from fxgraft.runtime.serve.options import ServeOptions
from fxgraft.runtime.serve.refusals import error_object, of_validation, refusal
from fxgraft.runtime.serve.schema import ChatRequest, CompletionRequest
from fxgraft.runtime.serve.service import Service
from fxgraft.runtime.serve.worker import Worker
from fxgraft.version import __version__

_log = logging.getLogger(__name__)
Body = TypeVar("Body", bound=BaseModel)
_DISCONNECTED = 499


def create_app(
    engine: Engine,
    tokenizer: Any,
    model: ServedModel,
    options: ServeOptions | None = None,
    keys: Iterable[str] = (),
    images: ImageChats | None = None,
) -> FastAPI:
    """The server as an ASGI application; ``app.state.service`` is its ``Service``.

    Args:
        engine: is run in a thread while the application's lifespan lasts, then closed.
        tokenizer: of transformers, used by nobody else.
        model: what the server says of itself.
        options: limits and timeouts.
        keys: API keys; none lets in everybody.
        images: what the server knows of images; default that it takes none.
    """
    worker = Worker(engine)
    service = Service(worker, model, tokenizer, options or ServeOptions(), images)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        worker.start()
        try:
            yield
        finally:
            await worker.stop()
            service.prompts.close()

    app = FastAPI(
        title="fxgraft", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    app.state.service = service
    app.add_middleware(_Counted, metrics=service.metrics)
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.add_exception_handler(ClientDisconnect, _went_away)
    app.add_exception_handler(Exception, _crashed)
    _add_routes(app, service, KeyCheck(keys))
    return app


def _add_routes(app: FastAPI, service: Service, check: KeyCheck) -> None:
    guarded = [Depends(check)]

    @app.get("/health")
    async def health() -> Response:
        state = service.state
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(status.page(service))

    @app.get("/status.json", dependencies=guarded)
    async def numbers() -> Response:
        return JSONResponse(status.numbers(service), headers={"Cache-Control": "no-store"})

    @app.get("/metrics", dependencies=guarded)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.model.as_json()]})

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    async def one_model(name: str) -> Response:
        if name != service.model.name:
            raise refusal(404, f"there is no model {name!r}", code="model_not_found")
        return JSONResponse(service.model.as_json())

    @app.post("/v1/completions", dependencies=guarded, openapi_extra=_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await service.complete(request, await _read(request, CompletionRequest, service))

    @app.post("/v1/chat/completions", dependencies=guarded, openapi_extra=_body(ChatRequest))
    async def chat(request: Request) -> Response:
        return await service.chat(request, await _read(request, ChatRequest, service))

    del health, page, numbers, metrics, models, one_model, completions, chat


def _body(kind: type[BaseModel]) -> dict[str, Any]:
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _read(request: Request, kind: type[Body], service: Service) -> Body:
    """The body, checked.

    Raises:
        HTTPException: it is too large, too slow, no JSON, or has wrong fields.
    """
    try:
        async with asyncio.timeout(service.options.request_timeout):
            raw = await _read_bytes(request, service.options.max_body_bytes)
    except TimeoutError as error:
        raise refusal(408, "the request's body did not come in time") from error
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise of_validation(error, kind.model_fields) from error


async def _read_bytes(request: Request, limit: int) -> bytes:
    too_large = refusal(
        413, f"the body has more than {limit} bytes: send a smaller one", code="body_too_large"
    )
    length = request.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > limit:
            raise too_large
    return bytes(raw)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    detail: object = error.detail
    if not isinstance(detail, dict):
        detail = error_object(error.status_code, f"{detail}: {request.method} {request.url.path}")
    return JSONResponse({"error": detail}, error.status_code, error.headers)


async def _went_away(request: Request, error: Exception) -> Response:
    return Response(status_code=_DISCONNECTED)


async def _crashed(request: Request, error: Exception) -> Response:
    _log.error("a request failed", exc_info=error)
    detail = error_object(500, f"the server failed: {type(error).__name__}")
    return JSONResponse({"error": detail}, 500)


class _Counted:
    """Counts answers by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                # Paths that lead nowhere share one label: clients must not make new ones.
                path = "other" if route is None else route.path
                self._metrics.http.labels(path=path, status=message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counting)
