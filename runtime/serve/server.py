"""The server's process: its socket, its signals, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Generator

import uvicorn
from fastapi import FastAPI

from fxgraft.errors import InputError
from fxgraft.runtime.serve.options import ServeOptions
from fxgraft.runtime.serve.service import Service

# Answers that are written already get this long to reach their clients.
_LAST_BYTES = 5
_POLL = 0.05


def serve(app: FastAPI, options: ServeOptions, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    From the first signal on, new requests get status 503 and running ones ``grace_period`` seconds;
    what then still runs is cancelled. A second signal cancels at once.

    Args:
        app: of ``create_app``.
        options: address and grace period.
        announce: told the address as soon as requests are answered.

    Raises:
        InputError: the address cannot be listened on.
    """
    listener = listen(options.host, options.port)
    with contextlib.closing(listener):
        asyncio.run(_serve(app, options, listener, announce))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: the address is in use, or does not exist here.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"the server cannot listen on {host} port {port}: {error}",
            "choose another --host or --port (0 takes a free port)",
        ) from error


async def _serve(
    app: FastAPI, options: ServeOptions, listener: socket.socket, announce: Callable[[str], None]
) -> None:
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        ws="none",
        timeout_graceful_shutdown=_LAST_BYTES,
    )
    server = _Server(config)
    drain = _Drain(server, app.state.service, options.grace_period)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain.begin)
    telling = asyncio.create_task(_tell(server, _address(listener), announce))
    try:
        await server.serve(sockets=[listener])
    finally:
        telling.cancel()
        drain.cancel()


class _Server(uvicorn.Server):
    """uvicorn's server; signals are handled by ``_Drain``."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave the signals alone."""
        yield


class _Drain:
    """Ends a server: softly at the first signal, at once at the second."""

    def __init__(self, server: uvicorn.Server, service: Service, grace_period: float) -> None:
        self._server, self._service, self._grace_period = server, service, grace_period
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Handle a signal."""
        if self._task is not None:
            self._service.worker.end_all()
            self._server.should_exit = True
            return
        self._service.draining = True
        self._task = asyncio.get_running_loop().create_task(self._run())

    def cancel(self) -> None:
        """Stop waiting."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace_period):
                while not self._service.is_idle:
                    await asyncio.sleep(_POLL)
        self._service.worker.end_all()
        self._server.should_exit = True


async def _tell(server: uvicorn.Server, address: str, announce: Callable[[str], None]) -> None:
    while not server.started:
        await asyncio.sleep(_POLL)
    announce(address)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
