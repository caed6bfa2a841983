"""Prompts that are being taken in, chunk by chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fxgraft.errors import Error
from fxgraft.images import EMBEDS
from fxgraft.paged_model import PagedModel, Rows
from fxgraft.runtime.engine.batch import request_values, table_of, upload
from fxgraft.runtime.engine.failures import as_error
from fxgraft.runtime.engine.full_chunk import FullChunk
from fxgraft.runtime.engine.memory import StateMemory
from fxgraft.runtime.engine.options import EngineOptions
from fxgraft.runtime.engine.prefix import block_keys
from fxgraft.runtime.engine.request import Request
from fxgraft.stepping import neutral


class Prefill:
    """Takes prompts in, in turn, at most ``chunk_tokens`` per step.

    Args:
        model: the paged model.
        memory: where requests' state lies.
        options: of the engine.
        full_chunk: computes full chunks.
    """

    def __init__(
        self,
        model: PagedModel,
        memory: StateMemory,
        options: EngineOptions,
        full_chunk: FullChunk,
    ) -> None:
        self.model, self.memory, self.options = model, memory, options
        self._full_chunk = full_chunk
        self.requests: deque[Request] = deque()
        self._logits: dict[Request, Tensor] = {}

    def add(self, request: Request) -> int:
        """Begin with a request; the number of its tokens whose state was found."""
        holding, known = request.holding, request.known
        assert holding is not None
        reused = 0
        if self.options.prefix_reuse:
            keys = block_keys(holding.seed, known, self.memory.block_size, (), request.images)
            reused, snapshot = self.memory.reuse(holding, keys, len(known) - 1)
            if snapshot is not None:
                self._copy_slot(snapshot, holding.slot)
        self.memory.grow(holding, len(known))
        request.past = reused
        self.requests.append(request)
        return reused

    def remove(self, request: Request) -> None:
        """Stop taking a request in."""
        if request in self.requests:
            self.requests.remove(request)
        self._logits.pop(request, None)

    def run(self) -> Iterator[tuple[Request, Error | None]]:
        """Take in one step's tokens, a chunk of each request in turn.

        Yields:
            Each request whose chunk was computed, with what went wrong, if anything.
        """
        budget = self.options.chunk_tokens
        for _ in range(len(self.requests)):
            if budget <= 0 or not self.requests:
                return
            request = self.requests[0]
            self.requests.rotate(-1)
            count = self._chunk(request, budget)
            budget -= count
            try:
                self._compute(request, count)
            except Exception as error:
                yield request, as_error(error, f"taking in the prompt of {request.id}")
            else:
                yield request, None

    def completed(self) -> list[tuple[Request, Tensor]]:
        """Requests whose prompt is complete, with the logits behind it [1, V]."""
        done = list(self._logits.items())
        for request, _ in done:
            self.remove(request)
        return done

    def keep_prefix(self, request: Request) -> None:
        """Remember a request's full blocks for others that begin alike."""
        holding = request.holding
        if not self.options.prefix_reuse or holding is None:
            return
        computed = request.known[: request.past]
        size, images = self.memory.block_size, request.images
        keys = block_keys(holding.seed, computed, size, holding.keys, images)
        self.memory.keep(holding, keys)

    def _chunk(self, request: Request, budget: int) -> int:
        """Tokens to compute now; ends at full blocks where fixed state is to be remembered."""
        total, size = len(request.known), self.memory.block_size
        count = min(budget, total - request.past)
        if not (self.memory.has_slots and self.options.prefix_reuse and self.options.snapshots):
            return count
        end = request.past + count
        aligned = (min(end, total - 1) // size) * size
        return aligned - request.past if aligned > request.past else count

    def _compute(self, request: Request, count: int) -> None:
        holding = request.holding
        assert holding is not None
        start, end = request.past, request.past + count
        device = self.model.device
        tokens = np.array([request.known[start:end]], dtype=np.int64)
        rows = Rows(
            upload(tokens, device),
            torch.full((1,), start, dtype=torch.int32, device=device),
            torch.full((1,), holding.slot, dtype=torch.int64, device=device),
            [upload(table[:, None], device) for table in table_of(holding)],
            start,
            self._inputs(request, start, end),
        )
        take_in = self._full_chunk if self._full_chunk.takes(rows) else self.model
        logits = take_in(rows)
        request.past = end
        # Before blocks outside a window are let go.
        self.keep_prefix(request)
        self.memory.trim(holding, end)
        self._snapshot(request)
        if end == len(request.known):
            self._logits[request] = logits

    def _inputs(self, request: Request, start: int, end: int) -> dict[str, Tensor]:
        """Values of the model's other inputs for tokens ``start`` to ``end``."""
        values = request_values(request)
        inputs = {
            spec.name: neutral(spec, 1, self.model.device).fill_(values[spec.name])
            for spec in self.model.paged.request_inputs
            if spec.name in values
        }
        if request.images is not None:
            inputs[EMBEDS] = request.images.embeds(start, end)
        return inputs

    def _snapshot(self, request: Request) -> None:
        """Keep a copy of fixed state at the end of a full block."""
        holding, size = request.holding, self.memory.block_size
        assert holding is not None
        if not (self.memory.has_slots and self.options.prefix_reuse) or request.past % size:
            return
        slot = self.memory.snapshot(holding.keys[-1])
        if slot is not None:
            self._copy_slot(holding.slot, slot)

    def _copy_slot(self, source: int, target: int) -> None:
        for pool in self.model.slot_pools:
            pool[target].copy_(pool[source])
