"""The engine's thread, and how the event loop talks with it.

The engine belongs to one thread. The event loop sends it calls through a queue, and gets tokens
back in one ``call_soon_threadsafe`` per step, so that the loop stays free for other requests.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxgraft.errors import Error
from fxgraft.generation import SamplingOptions
from fxgraft.runtime.engine import Engine, EngineStats, Request
from fxgraft.runtime.serve.image_chats import Prompt

_log = logging.getLogger(__name__)
_MAX_CRASHES = 3


@dataclass(frozen=True)
class Tokens:
    """What one or more steps gave a request.

    Attributes:
        tokens: the new ones.
        finish_reason: the engine's, ``"refused"`` or ``"shut_down"``; None while it runs.
        error: why it failed.
    """

    tokens: tuple[int, ...] = ()
    finish_reason: str | None = None
    error: Error | None = None


class TokenStream:
    """The tokens of one request as they come. Used in the event loop only.

    Attributes:
        inbox: where each step's tokens go; several streams may share it.
        prompt_tokens: length of the prompt.
        max_new_tokens: most tokens that can come.
        arrived, first_token, last_token: seconds of ``time.monotonic``; 0: not yet.
        taken: done when the engine has taken or refused the request.
        request: the engine's, None until it was taken.
        received: how many tokens came.
        finish_reason: as that of ``Tokens``; None while more may come.
    """

    def __init__(
        self, inbox: Inbox, prompt_tokens: int, max_new_tokens: int, arrived: float
    ) -> None:
        self.inbox = inbox
        self.prompt_tokens = prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.arrived = arrived
        self.first_token = self.last_token = 0.0
        self.taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.request: Request | None = None
        self.received = 0
        self.finish_reason: str | None = None

    @property
    def remaining(self) -> int:
        """Most tokens that may still come."""
        return self.max_new_tokens - self.received

    def put(self, new: Tokens) -> None:
        """Add what a step gave; nothing is added after the end."""
        if self.finish_reason is not None:
            return
        if new.tokens:
            self.last_token = time.monotonic()
            self.first_token = self.first_token or self.last_token
        self.received += len(new.tokens)
        self.finish_reason = new.finish_reason
        self.inbox.put_nowait((self, new))


Inbox = asyncio.Queue[tuple[TokenStream, Tokens]]
"""Where the tokens of one or more streams arrive, in order."""


class Worker:
    """Runs an engine in a thread of its own.

    Args:
        engine: used by no one else from ``start`` on.

    Attributes:
        stats: the engine's, after its last step.
        problem: why the engine does not run any more, None while it does.
        on_progress: told in the event loop how many tokens a step gave.
        on_finish: told in the event loop of each request that ended, cancelled ones included.
    """

    def __init__(self, engine: Engine) -> None:
        self.stats: EngineStats = engine.stats()
        self.problem: str | None = None
        self.on_progress: Callable[[int], None] = lambda tokens: None
        self.on_finish: Callable[[TokenStream], None] = lambda stream: None
        self._engine = engine
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # The streams of both sides; _running belongs to the engine's thread, _open to the loop.
        self._running: dict[int, tuple[Request, TokenStream]] = {}
        self._open: set[TokenStream] = set()
        self._outbox: list[tuple[TokenStream, Tokens]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._ends = False
        self._crashes = 0

    @property
    def open_streams(self) -> frozenset[TokenStream]:
        """The requests that have not ended."""
        return frozenset(self._open)

    def start(self) -> None:
        """Start the thread; call it in the event loop that will await."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread and close the engine; open requests end."""
        self.end_all()
        self._calls.put(self._end)
        await asyncio.to_thread(self._thread.join)

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingOptions,
        inputs: Mapping[str, float | str] | None,
        inbox: Inbox,
        arrived: float,
    ) -> TokenStream:
        """Give a request to the engine.

        ``taken`` of the stream raises InputError where the engine refuses the request, and Error
        where it does not run any more.

        Args:
            prompt: token ids and images.
            sampling: options, ``max_new_tokens`` among them.
            inputs: values of the model's inputs for this request.
            inbox: where the tokens go.
            arrived: when the client's request came.
        """
        stream = TokenStream(inbox, len(prompt.tokens), sampling.max_new_tokens, arrived)
        self._open.add(stream)
        self._calls.put(lambda: self._submit(stream, prompt, sampling, inputs))
        return stream

    def cancel(self, stream: TokenStream, reason: str = "cancelled") -> None:
        """End a request if it still runs; its blocks come back before the engine's next step."""
        if stream.finish_reason is not None:
            return
        self._receive([(stream, Tokens(finish_reason=reason))])
        self._calls.put(lambda: self._cancel(stream))

    def end_all(self) -> None:
        """End all requests because the server stops."""
        for stream in list(self._open):
            self.cancel(stream, "shut_down")

    # From here on: the engine's thread.

    def _run(self) -> None:
        is_busy = False
        while not self._ends:
            self._take_calls(wait=not is_busy)
            is_busy = self.problem is None and self._step()
            self._report_ends()
            self.stats = self._engine.stats()
            self._deliver()
        self._engine.close()

    def _take_calls(self, wait: bool) -> None:
        if wait:
            self._calls.get()()
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                return
            call()

    def _end(self) -> None:
        self._ends = True

    def _submit(
        self,
        stream: TokenStream,
        prompt: Prompt,
        sampling: SamplingOptions,
        inputs: Mapping[str, float | str] | None,
    ) -> None:
        def on_tokens(request: Request, tokens: Sequence[int]) -> None:
            if tokens:
                self._outbox.append((stream, Tokens(tuple(tokens))))

        try:
            if self.problem is not None:
                raise Error(self.problem, "restart the server")
            request = self._engine.submit(
                prompt.tokens, sampling, inputs=inputs, images=prompt.images, on_tokens=on_tokens
            )
        except Exception as error:
            self._send(self._refuse, stream, error)
            return
        self._running[id(stream)] = (request, stream)
        self._send(self._take, stream, request)

    def _cancel(self, stream: TokenStream) -> None:
        request, _ = self._running.pop(id(stream), (None, None))
        if request is not None:
            self._drop(request)

    def _drop(self, request: Request) -> None:
        try:
            self._engine.cancel(request)
        except Exception:
            _log.exception("a request could not be cancelled")

    def _step(self) -> bool:
        try:
            is_busy = self._engine.step()
        except Exception as error:
            _log.exception("the engine's step failed")
            self._give_up(error)
            return True
        if is_busy:
            self._crashes = 0
        return is_busy

    def _give_up(self, cause: Exception) -> None:
        """End every request after a step that failed as a whole; a few times in a row, stop."""
        reason = cause.problem if isinstance(cause, Error) else f"{type(cause).__name__}: {cause}"
        error = Error(f"the engine failed: {reason}", "see the server's log")
        for request, stream in self._running.values():
            self._drop(request)
            self._outbox.append((stream, Tokens(finish_reason="error", error=error)))
        self._running.clear()
        self._crashes += 1
        if self._crashes == _MAX_CRASHES:
            self.problem = error.problem

    def _report_ends(self) -> None:
        done = [key for key, (request, _) in self._running.items() if request.finish_reason]
        for key in done:
            request, stream = self._running.pop(key)
            end = Tokens(finish_reason=request.finish_reason, error=request.error)
            self._outbox.append((stream, end))

    def _deliver(self) -> None:
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._send(self._receive, outbox)

    def _send(self, call: Callable[..., None], *values: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call, *values)
        except RuntimeError:
            # The event loop has ended, nobody waits for this any more.
            _log.debug("nobody receives the engine's results")

    # From here on: the event loop again.

    def _take(self, stream: TokenStream, request: Request) -> None:
        stream.request = request
        if not stream.taken.done():
            stream.taken.set_result(None)

    def _refuse(self, stream: TokenStream, error: Exception) -> None:
        stream.finish_reason = stream.finish_reason or "refused"
        self._open.discard(stream)
        if not stream.taken.done():
            stream.taken.set_exception(error)

    def _receive(self, outbox: list[tuple[TokenStream, Tokens]]) -> None:
        for stream, new in outbox:
            was_open = stream.finish_reason is None
            stream.put(new)
            if was_open and stream.finish_reason is not None:
                self._open.discard(stream)
                self.on_finish(stream)
        self.on_progress(sum(len(new.tokens) for _, new in outbox))
