"""Full chunks of a prompt, computed by one captured call.

Launching the kernels of a chunk one by one takes the host longer than the chunk takes a fast GPU.
Chunks of ``chunk_tokens`` tokens always have the same shapes, so they can be captured once and
replayed, as decode steps are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxgraft.paged_model import PagedModel, Rows
from fxgraft.stepping import neutral

_log = logging.getLogger(__name__)
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class FullChunk:
    """The computation of one request's chunk of ``tokens`` tokens.

    Args:
        model: the paged model.
        tokens: of a chunk.
        pages: most pages of a request.
        capture: makes a step out of a function that always uses the same tensors.
    """

    def __init__(self, model: PagedModel, tokens: int, pages: int, capture: Capture) -> None:
        device = model.device
        self._model, self._capture = model, capture
        # Block 0 and slot 0 belong to nobody, so that capturing may write there.
        self._rows = Rows(
            torch.zeros(1, tokens, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            [
                torch.zeros(len(group.layers), 1, pages, dtype=torch.int32, device=device)
                for group in model.paged.groups
            ],
            None,
            {spec.name: neutral(spec, 1, device) for spec in model.paged.request_inputs},
        )
        self._calls: dict[bool, Callable[[], Tensor]] = {}

    def takes(self, rows: Rows) -> bool:
        """Whether these rows are such a chunk, with no other inputs than a request's own."""
        is_full = rows.input_ids.shape == self._rows.input_ids.shape
        known = rows.inputs.keys() <= self._rows.inputs.keys()
        return is_full and known and not self._model.paged.needs_mask

    def prepare(self) -> None:
        """Capture the call for chunks with tokens before them, and for those without any."""
        if self._model.paged.needs_mask:
            return
        for fresh in (False, True):
            self._call(fresh)

    def __call__(self, rows: Rows) -> Tensor:
        """Logits of the last position [1, V], as the model's; ``takes`` says which rows."""
        call = self._call(rows.longest == 0)
        held = self._rows
        held.input_ids.copy_(rows.input_ids)
        held.past.copy_(rows.past)
        held.slots.copy_(rows.slots)
        _copy_tables(held.tables, rows.tables)
        for name, value in rows.inputs.items():
            held.inputs[name].copy_(value)
        return call().clone()

    def _call(self, fresh: bool) -> Callable[[], Tensor]:
        if fresh not in self._calls:
            held = replace(self._rows, longest=0 if fresh else None)
            self._calls[fresh] = self._captured(lambda: self._model(held))
        return self._calls[fresh]

    def _captured(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        try:
            return self._capture(call)
        except RuntimeError as error:
            _log.warning("chunks of prompts are launched kernel by kernel, slower: %s", error)
            return call


def _copy_tables(held: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    for mine, table in zip(held, given, strict=True):
        mine[..., : table.shape[-1]].copy_(table)
        mine[..., table.shape[-1] :].zero_()
