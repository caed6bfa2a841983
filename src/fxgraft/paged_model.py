"""A paged graph together with its pools, ready to be called on rows of requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fxgraft.generation.prompts import integers
from fxgraft.paging import PagedProgram
from fxgraft.stepping import neutral


class RunPages(Protocol):
    """A lowered paged graph."""

    def __call__(self, values: Sequence[Tensor], *, fresh: bool) -> Tensor:
        """Run it.

        Args:
            values: its inputs in order; pools among them are changed.
            fresh: whether no row has tokens before the new ones, which may be faster.

        Returns:
            Logits [B, 1, V].
        """
        ...


@dataclass(frozen=True)
class Rows:
    """Where the rows of one call lie; B rows, S new tokens each.

    Attributes:
        input_ids: int64 [B, S].
        past: int32 [B], tokens before the new ones; negative in rows without a request.
        slots: int64 [B], slot of fixed state; 0 in rows without a request.
        tables: int32 [ops, B, P] per group.
        longest: the largest ``past``, if the caller knows it; needed by graphs whose
            ``needs_mask`` is set, and there it decides how many past tokens are looked at.
        inputs: values of inputs that a request may set, [B, ...] or [B, S, ...] by name.
    """

    input_ids: Tensor
    past: Tensor
    slots: Tensor
    tables: Sequence[Tensor]
    longest: int | None
    inputs: Mapping[str, Tensor]

    def select(self, place: Tensor, longest: int) -> Rows:
        """Only the rows int64 [n] at ``place``; ``longest`` is their largest past."""
        return Rows(
            self.input_ids[place],
            self.past[place],
            self.slots[place],
            [table[:, place] for table in self.tables],
            longest,
            {name: value[place] for name, value in self.inputs.items()},
        )


class PagedModel:
    """Calls a lowered paged graph.

    Args:
        paged: the graph's description.
        run: the lowered graph.
        blocks: blocks per group; block 0 belongs to nobody.
        slots: slots of fixed state; slot 0 belongs to nobody.
    """

    def __init__(
        self, paged: PagedProgram, run: RunPages, *, blocks: Sequence[int], slots: int
    ) -> None:
        self.paged = paged
        self.device = paged.program.device
        self._run = run
        self.block_pools = [
            [pool.empty(count, self.device) for pool in group.pools]
            for group, count in zip(paged.groups, blocks, strict=True)
        ]
        self.slot_pools = [pool.empty(slots, self.device) for pool in paged.slot_pools]
        self._pools = [pool for pools in self.block_pools for pool in pools] + self.slot_pools
        # Such a graph counts positions from the first column of the mask.
        self._counts_columns = paged.needs_mask and all(
            spec.name != "position_ids" for spec in paged.own_inputs
        )

    @torch.no_grad()
    def __call__(self, rows: Rows) -> Tensor:
        """Take new tokens in; logits of the last position [B, V]."""
        if self._counts_columns and len(rows.input_ids) > 1:
            return self._by_length(rows)
        return self._together(rows)

    def _by_length(self, rows: Rows) -> Tensor:
        """Rows with equally many tokens together, so that none begins behind the first column."""
        pasts = rows.past.clamp(min=0)
        parts: list[Tensor] = []
        places: list[Tensor] = []
        for past in integers(cast(Any, torch).unique(pasts)):
            place = (pasts == past).nonzero()[:, 0]
            places.append(place)
            parts.append(self._together(rows.select(place, past)))
        return torch.cat(parts)[torch.cat(places).argsort()]

    def _together(self, rows: Rows) -> Tensor:
        batch, new = rows.input_ids.shape
        own = {
            "input_ids": rows.input_ids,
            "position_ids": positions(rows.past, new),
            "attention_mask": self._mask(rows, new),
            **rows.inputs,
        }
        values = [
            own[spec.name] if spec.name in own else neutral(spec, batch, self.device, new)
            for spec in self.paged.own_inputs
        ]
        inputs = [*values, rows.past, rows.slots, *rows.tables, *self._pools]
        result = self._run(inputs, fresh=rows.longest == 0)
        return result[:, -1]

    @torch.no_grad()
    def decode(self, rows: Rows, chosen: Tensor) -> Tensor:
        """Take in one token per row, choose the likeliest next one, and get ready to go on from it.

        Everything happens in place, so the call may be captured and replayed.

        Args:
            rows: ``input_ids`` get the chosen tokens, and ``past`` counts on.
            chosen: int64 [B], gets them too, or -1 where logits are not finite.

        Returns:
            Logits [B, V].
        """
        logits = self(rows)
        step = cast(Any, torch.ops).fxgraft.greedy_step
        step(logits, rows.input_ids[:, 0], rows.past, chosen)
        return logits

    def _mask(self, rows: Rows, new: int) -> Tensor:
        batch = rows.input_ids.shape[0]
        if not self.paged.needs_mask:
            one = torch.ones(1, 1, dtype=torch.int64, device=self.device)
            return one.expand(batch, new)
        assert rows.longest is not None
        total = rows.longest + new
        place = torch.arange(total, device=self.device)
        return (place >= total - new - rows.past[:, None]).long()


def positions(past: Tensor, new: int) -> Tensor:
    """Positions int64 [B, S] of the new tokens; from 0 on in rows without a request."""
    steps = torch.arange(new, device=past.device)
    return past.clamp(min=0)[:, None] + steps
