"""Generation for one batch over a paged graph: each row has its own run of blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxgraft.generation.prompts import integers
from fxgraft.generation.unread import UnreadTokens
from fxgraft.paged_model import PagedModel, Rows, RunPages
from fxgraft.paging import PagedProgram
from fxgraft.state import is_token_input
from fxgraft.stepping import ProgramFacts

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
_FIRST_CAPACITY = 1024


@dataclass
class RowState:
    """The rows of one call of ``generate``.

    Attributes:
        rows: the row of the pools of each row of the batch.
        past: tokens that each has seen.
    """

    rows: list[int]
    past: list[int]


class PagedStepModel(ProgramFacts):
    """A step model whose state stays in place on the device.

    One call of ``generate`` at a time uses it. The pools grow when a batch is larger or a text
    longer than any before; steps are captured once for each number of rows.

    Args:
        paged: the graph's description.
        run: the lowered graph.
        capture: makes a step out of a function that always uses the same tensors.
    """

    def __init__(self, paged: PagedProgram, run: RunPages, capture: Capture) -> None:
        super().__init__(paged.program)
        self._paged, self._run, self._capture = paged, run, capture
        self._device = paged.program.device
        self._row_count = self._capacity = 0
        self._model: PagedModel | None = None
        self._tables: list[Tensor] = []
        self._tokens = torch.zeros(0, dtype=torch.int64, device=self._device)
        self._steps: dict[int, Callable[[], Tensor]] = {}
        # The state whose rows and pasts the device holds.
        self._sent: RowState | None = None

    def empty_state(self, batch: int) -> RowState:
        """No row has seen anything."""
        self._reserve(batch, _FIRST_CAPACITY)
        return RowState(list(range(batch)), [0] * batch)

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        state: RowState,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, RowState]:
        """Take new tokens in; see ``StepModel.step``.

        Args:
            input_ids, attention_mask, position_ids, state: see there.
            inputs: values [B, ...] of the model's other inputs, with prompts only.
        """
        batch, new = input_ids.shape
        real = [1] * batch if new == 1 else integers(attention_mask[:, -new:].sum(dim=1))
        self._reserve(self._row_count, max(p + n for p, n in zip(state.past, real, strict=True)))
        ids = input_ids.to(self._device)
        if new == 1:
            logits = self._decode(ids[:, 0], state)
        else:
            logits = torch.cat([
                self._prefill(ids[i : i + 1, new - n :], row, past, self._of_row(inputs, i, n))
                for i, (row, past, n) in enumerate(zip(state.rows, state.past, real, strict=True))
            ])  # fmt: skip
        past = [p + n for p, n in zip(state.past, real, strict=True)]
        after = RowState(state.rows, past)
        self._sent = after if new == 1 else None
        return logits.to(input_ids.device), after

    @torch.no_grad()
    def step_greedy(self, tokens: Tensor | None, state: RowState) -> tuple[UnreadTokens, RowState]:
        """Take in one token per row without waiting; see ``GreedyStepModel.step_greedy``."""
        self._reserve(self._row_count, max(state.past) + 1)
        self._decode(None if tokens is None else tokens.to(self._device), state)
        self._sent = RowState(state.rows, [past + 1 for past in state.past])
        return UnreadTokens.of(self._chosen[: len(state.rows)]), self._sent

    def select(self, state: RowState, rows: Tensor) -> RowState:
        """State of only these rows; nothing moves."""
        chosen = integers(rows)
        return RowState([state.rows[i] for i in chosen], [state.past[i] for i in chosen])

    def _reserve(self, rows: int, tokens: int) -> None:
        """Make room; what rows hold is kept."""
        if rows <= self._row_count and tokens <= self._capacity:
            return
        old, old_rows, old_pages = self._model, self._row_count, self._pages(self._capacity)
        self._row_count = max(rows, self._row_count)
        while self._capacity < tokens:
            self._capacity = max(2 * self._capacity, _FIRST_CAPACITY)
        pages = self._pages(self._capacity)
        counts = [len(g.layers) * self._row_count * pages + 1 for g in self._paged.groups]
        self._model = PagedModel(self._paged, self._run, blocks=counts, slots=self._row_count + 1)
        self._tables = [
            torch.arange(1, count, dtype=torch.int32, device=self._device).view(
                len(group.layers), self._row_count, pages
            )
            for group, count in zip(self._paged.groups, counts, strict=True)
        ]
        if old is not None:
            _copy_state(old, self._model, old_rows, old_pages, self._tables)
        self._allocate_inputs()

    def _allocate_inputs(self) -> None:
        count = self._row_count
        old = self._tokens
        self._tokens = torch.zeros(count, dtype=torch.int64, device=self._device)
        self._tokens[: len(old)] = old
        self._chosen = torch.zeros_like(self._tokens)
        self._past = torch.zeros(count, dtype=torch.int32, device=self._device)
        self._slots = torch.zeros(count, dtype=torch.int64, device=self._device)
        self._used = [torch.zeros_like(table) for table in self._tables]
        self._steps.clear()
        self._sent = None

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._paged.block_size)

    def _decode(self, tokens: Tensor | None, state: RowState) -> Tensor:
        """Logits behind tokens, or behind those that the step before chose."""
        count = len(state.rows)
        if tokens is not None:
            self._tokens[:count] = tokens
        if state is not self._sent:
            self._send(state)
        if self._paged.needs_mask:
            return self._run_rows(count, max(state.past))
        if count not in self._steps:
            self._capture_rows(count)
            self._send(state)
        return self._steps[count]()

    def _capture_rows(self, count: int) -> None:
        """Capturing runs the step more than once: no row has a request meanwhile."""
        kept = self._tokens.clone()
        self._past[:count] = -1
        self._slots[:count] = 0
        self._steps[count] = self._capture(lambda: self._run_rows(count, None))
        self._tokens.copy_(kept)

    def _send(self, state: RowState) -> None:
        """Let the rows of steps be those of a state."""
        count = len(state.rows)
        rows = torch.tensor(state.rows, device=self._device)
        self._past[:count] = torch.tensor(state.past, dtype=torch.int32, device=self._device)
        self._slots[:count] = rows + 1
        for used, table in zip(self._used, self._tables, strict=True):
            used[:, :count] = table[:, rows]

    def _run_rows(self, count: int, longest: int | None) -> Tensor:
        assert self._model is not None
        rows = Rows(
            self._tokens[:count, None],
            self._past[:count],
            self._slots[:count],
            [used[:, :count] for used in self._used],
            longest,
            {},
        )
        return self._model.decode(rows, self._chosen[:count])

    def _of_row(
        self, inputs: Mapping[str, Tensor] | None, row: int, real: int
    ) -> dict[str, Tensor]:
        """One row's values of other inputs, without those of padding."""
        per_token = {spec.name for spec in self._paged.own_inputs if is_token_input(spec)}
        return {
            name: (value[row : row + 1, -real:] if name in per_token else value[row : row + 1]).to(
                self._device
            )
            for name, value in (inputs or {}).items()
        }

    def _prefill(self, ids: Tensor, row: int, past: int, inputs: Mapping[str, Tensor]) -> Tensor:
        assert self._model is not None
        return self._model(
            Rows(
                ids,
                torch.full((1,), past, dtype=torch.int32, device=self._device),
                torch.full((1,), row + 1, dtype=torch.int64, device=self._device),
                [table[:, row : row + 1] for table in self._tables],
                past,
                inputs,
            )
        )


def _copy_state(
    old: PagedModel, new: PagedModel, rows: int, pages: int, tables: list[Tensor]
) -> None:
    for old_pools, new_pools, table in zip(old.block_pools, new.block_pools, tables, strict=True):
        target = table[:, :rows, :pages].flatten().long()
        for old_pool, new_pool in zip(old_pools, new_pools, strict=True):
            new_pool[target] = old_pool[1:]
    for old_pool, new_pool in zip(old.slot_pools, new.slot_pools, strict=True):
        new_pool[: rows + 1] = old_pool
