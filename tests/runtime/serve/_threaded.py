"""A server on a real socket, in a thread of the test's process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator
from typing import Any

import uvicorn

from fxgraft.runtime.serve.server import listen


@contextlib.contextmanager
def served(app: Any) -> Generator[str]:
    """Serve an ASGI application; gives its address."""
    with contextlib.closing(listen("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            app, log_level="warning", ws="none", lifespan="on", timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            end = time.monotonic() + 20
            while not server.started:
                assert thread.is_alive()
                assert time.monotonic() < end
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
