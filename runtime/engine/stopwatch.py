"""Timing single kinds of engine steps: chunks of prompts, running requests, or both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch

from fxgraft.errors import InputError
from fxgraft.generation.options import SamplingOptions
from fxgraft.runtime.engine.engine import Engine
from fxgraft.runtime.engine.prefix import seed_key
from fxgraft.runtime.engine.request import Request

_WARM = 2


class Stopwatch:
    """Times steps of an idle engine.

    Args:
        engine: without requests; what it measures leaves it so.
        repeats: steps that are timed together.
        rounds: times that this is done; the median counts.

    Raises:
        InputError: the engine has requests, or a number is below 1.
    """

    def __init__(self, engine: Engine, repeats: int, rounds: int) -> None:
        if repeats < 1 or rounds < 1:
            raise InputError(f"{repeats} repeats in {rounds} rounds", "give at least 1 of each")
        stats = engine.stats()
        if stats.queued or stats.prefilling or stats.running:
            raise InputError("the engine has requests", "measure before they come, or a new engine")
        self.engine, self.repeats, self.rounds = engine, repeats, rounds
        self._cuda = engine.model.device.type == "cuda"
        self._number = 0

    @property
    def longest_context(self) -> int:
        """Most keys of a request that ``decode`` can measure."""
        return max(self.engine.max_context - 1 - self._steps // 2, 1)

    def longest_cached(self, new: int) -> int:
        """Most tokens in front of a chunk of ``new`` that ``prefill`` can measure; may be < 0."""
        return self.engine.max_context - new - 1

    def prefill(self, new: int, cached: int) -> float | None:
        """Seconds of a step that takes in ``new`` tokens behind ``cached`` ones.

        Returns:
            None if the engine's context or memory is too little.
        """
        with self._waiting(new, cached) as request:
            return None if request is None else self._time(lambda: self._chunk(request, cached))

    def decode(self, batch: int, context: int) -> float | None:
        """Seconds of a step of ``batch`` requests that attend to ``context`` keys on average.

        Returns:
            None if the engine's context or memory is too little.
        """
        with self._running(batch, context) as fits:
            return self._time(self._step) if fits else None

    def mixed(self, new: int, cached: int, batch: int, context: int) -> float | None:
        """Seconds of a step that does both; see ``prefill`` and ``decode``."""
        with self._running(batch, context) as fits, self._waiting(new, cached) as request:
            if not fits or request is None:
                return None
            return self._time(lambda: self._chunk(request, cached))

    def _chunk(self, request: Request, cached: int) -> None:
        request.past = cached
        self._step()

    def _step(self) -> None:
        if not self.engine.step():
            raise AssertionError("the engine had nothing to do")

    def _time(self, step: Callable[[], object]) -> float:
        for _ in range(_WARM):
            step()
        return statistics.median(self._once(step) for _ in range(self.rounds))

    def _once(self, step: Callable[[], object]) -> float:
        if not self._cuda:
            start = time.perf_counter()
            for _ in range(self.repeats):
                step()
            return (time.perf_counter() - start) / self.repeats
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.engine.model.device)
        first.record()
        for _ in range(self.repeats):
            step()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3 / self.repeats

    @property
    def _steps(self) -> int:
        """Steps that one measurement takes."""
        return _WARM + self.repeats * self.rounds

    @contextmanager
    def _waiting(self, new: int, cached: int) -> Generator[Request | None]:
        """A request whose next chunk is ``new`` tokens, and not its last one."""
        engine = self.engine
        tokens = cached + new + 1
        request = self._request(tokens) if tokens <= engine.max_context else None
        options = engine.prefill.options
        try:
            if request is not None:
                request.status, request.past = "prefilling", cached
                engine.prefill.options = options.model_copy(
                    update={"chunk_tokens": new, "prefix_reuse": False}
                )
                engine.prefill.requests.append(request)
            yield request
        finally:
            if request is not None:
                engine.cancel(request)
            engine.prefill.options = options

    @contextmanager
    def _running(self, batch: int, context: int) -> Generator[bool]:
        """Requests in whose middle step each attends to ``context`` keys."""
        past = max(context - 1 - self._steps // 2, 0)
        requests: list[Request] = []
        fits = past + self._steps + 1 <= self.engine.max_context
        options = self.engine.prefill.options
        self.engine.prefill.options = options.model_copy(update={"prefix_reuse": False})
        try:
            for _ in range(batch if fits else 0):
                request = self._request(max(past, 1), past + self._steps + 1)
                if request is None:
                    fits = False
                    break
                requests.append(request)
                self._join(request, past)
            yield fits
        finally:
            for request in requests:
                self.engine.cancel(request)
            self.engine.step()
            self.engine.prefill.options = options

    def _join(self, request: Request, past: int) -> None:
        engine, holding = self.engine, request.holding
        assert holding is not None
        request.status, request.past, request.launched = "running", past, 1
        engine.memory.trim(holding, past)
        token = torch.ones(1, dtype=torch.int64, device=engine.model.device)
        engine.batch.join(request, token, holding)

    def _request(self, tokens: int, reserved: int = 0) -> Request | None:
        """A request of ``tokens`` tokens with memory for ``reserved``; None if there is too little.

        What is reserved must be free, and is left to the engine to take.
        """
        engine, memory = self.engine, self.engine.memory
        if not memory.can_open(max(tokens, reserved)):
            return None
        self._number += 1
        choices = dict.fromkeys(engine.model.paged.choices, 0)
        sampling = SamplingOptions(max_new_tokens=2**30, eos_token_id=())
        request = Request(
            f"measured-{self._number}", (1,) * tokens, sampling, choices=choices,
            order=-self._number,
        )  # fmt: skip
        request.holding = memory.open(seed_key(request.inputs, request.choices))
        memory.grow(request.holding, max(tokens, reserved))
        return request
