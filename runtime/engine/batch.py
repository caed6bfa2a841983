"""The rows of requests that generate: their tensors on the device, and the step over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxgraft.paged_model import PagedModel, Rows
from fxgraft.runtime.engine.memory import Added, Holding
from fxgraft.runtime.engine.request import Request
from fxgraft.state import is_token_input
from fxgraft.stepping import neutral

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class Batch:
    """Running requests in rows 0 to ``len(requests) - 1``.

    All tensors keep their place in memory, so a step may be captured once per number of rows and
    replayed. A step reads the last token of each row, writes the next one there, and counts on.

    Args:
        model: the paged model.
        max_batch: number of rows.
        max_pages: pages per row.
        bucket: the number of rows that a step over n requests computes, at least n.
        capture: makes a step out of a function that always uses the same tensors.
    """

    def __init__(
        self,
        model: PagedModel,
        max_batch: int,
        max_pages: int,
        bucket: Callable[[int], int],
        capture: Capture,
    ) -> None:
        device = model.device
        self.model, self.device = model, device
        self.requests: list[Request] = []
        self.tokens = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.chosen = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.past = torch.full((max_batch,), -1, dtype=torch.int32, device=device)
        self.slots = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.tables = [
            torch.zeros(len(g.layers), max_batch, max_pages, dtype=torch.int32, device=device)
            for g in model.paged.groups
        ]
        self.inputs = {
            spec.name: neutral(spec, max_batch, device) for spec in model.paged.request_inputs
        }
        # No row of an answer is part of an image; what stays as it is need not be made per step.
        self._constant = {
            spec.name: neutral(spec, max_batch, device)
            for spec in model.paged.own_inputs
            if is_token_input(spec)
        }
        self._per_row = [self.tokens, self.past, self.slots, *self.inputs.values()]
        self.bucket, self._capture = bucket, capture
        self._steps: dict[int, Callable[[], Tensor]] = {}
        self._growth: list[list[tuple[int, int, Any]]] = [[] for _ in self.tables]

    @property
    def count(self) -> int:
        """Number of requests in it."""
        return len(self.requests)

    def join(self, request: Request, token: Tensor, holding: Holding) -> None:
        """Add a request.

        Args:
            request: its ``past`` and ``inputs`` are taken over.
            token: its last token, int64 [1] on the device.
            holding: its blocks and slot.
        """
        row = request.row = len(self.requests)
        self.requests.append(request)
        self.tokens[row : row + 1] = token
        self.past[row : row + 1].fill_(request.past)
        self.slots[row : row + 1].fill_(holding.slot)
        for name, value in request_values(request).items():
            self.inputs[name][row : row + 1].fill_(value)
        for table in self.tables:
            table[:, row].zero_()
        self._send_tables(row, holding)

    def leave(self, request: Request) -> None:
        """Remove a request; the last row takes its place."""
        row, last = request.row, len(self.requests) - 1
        assert row is not None
        assert self.requests[row] is request
        self.flush()
        moved = self.requests.pop()
        request.row = None
        if row != last:
            self.requests[row] = moved
            moved.row = row
            for tensor in self._per_row:
                tensor[row : row + 1] = tensor[last : last + 1]
            for table in self.tables:
                table[:, row] = table[:, last]
        self.past[last : last + 1].fill_(-1)
        self.slots[last : last + 1].zero_()
        for table in self.tables:
            table[:, last].zero_()

    def grew(self, request: Request, added: Sequence[Added]) -> None:
        """Take note of new pages of a request; sent to the device with the next step."""
        assert request.row is not None
        for one in added:
            for number, page in enumerate(one.pages, start=one.start):
                self._growth[one.group].append((request.row, number, page.blocks))

    def refresh(self, request: Request, holding: Holding) -> None:
        """Send what a request holds and sets once more."""
        self.flush()
        row = request.row
        assert row is not None
        for name, value in request_values(request).items():
            self.inputs[name][row : row + 1].fill_(value)
        self._send_tables(row, holding)

    def _send_tables(self, row: int, holding: Holding) -> None:
        for table, blocks in zip(self.tables, table_of(holding), strict=True):
            if blocks.size:
                table[:, row, : blocks.shape[1]] = upload(blocks, self.device)

    def flush(self) -> None:
        """Send new pages to the device."""
        for table, growth in zip(self.tables, self._growth, strict=True):
            if not growth:
                continue
            rows, numbers, blocks = zip(*growth, strict=True)
            places = upload(np.array([rows, numbers], dtype=np.int64), self.device)
            table[:, places[0], places[1]] = upload(np.stack(blocks, axis=1), self.device)
            growth.clear()

    def launch(self) -> tuple[Tensor, Tensor]:
        """Run one step.

        Returns:
            Logits [n, V], and the likeliest tokens int64 [n], -1 where logits are not finite. Both
            are overwritten by the next step.
        """
        self.flush()
        count = len(self.requests)
        rows = self.bucket(count)
        if self.model.paged.needs_mask:
            longest = max(request.past for request in self.requests)
            return self._step(rows, longest)[:count], self.chosen[:count]
        if rows not in self._steps:
            self.prepare(rows)
        return self._steps[rows]()[:count], self.chosen[:count]

    def prepare(self, rows: int) -> Callable[[], Tensor]:
        """Capture the step over this many rows; capturing runs it, so no row has a request then."""
        past, tokens = self.past.clone(), self.tokens.clone()
        self.past.fill_(-1)
        self._steps[rows] = self._capture(lambda: self._step(rows, None))
        self.past.copy_(past)
        self.tokens.copy_(tokens)
        return self._steps[rows]

    def _step(self, rows: int, longest: int | None) -> Tensor:
        held = Rows(
            self.tokens[:rows, None],
            self.past[:rows],
            self.slots[:rows],
            [table[:, :rows] for table in self.tables],
            longest,
            {n: value[:rows] for n, value in (*self.inputs.items(), *self._constant.items())},
        )
        return self.model.decode(held, self.chosen[:rows])


def request_values(request: Request) -> dict[str, float]:
    """Values of a request's inputs, its choices among them."""
    return {**request.inputs, **request.choices}


def table_of(holding: Holding) -> list[Any]:
    """Blocks of a holding per group, int32 [ops, pages]; 0 where it has none."""
    tables: list[Any] = []
    for pages in holding.pages:
        width = next((len(page.blocks) for page in pages if page is not None), 0)
        empty = np.zeros(width, dtype=np.int32)
        blocks = [empty if page is None else page.blocks for page in pages]
        tables.append(np.stack(blocks, axis=1) if blocks else np.zeros((0, 0), dtype=np.int32))
    return tables


def upload(values: Any, device: torch.device) -> Tensor:
    """An array on the device, without waiting for it."""
    tensor = torch.as_tensor(np.ascontiguousarray(values))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
