"""A paged graph together with its pools, ready to be called on rows of requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxgraft.generation.sampling import likeliest
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
        inputs: values of inputs that a request may set, [B, ...] by name.
    """

    input_ids: Tensor
    past: Tensor
    slots: Tensor
    tables: Sequence[Tensor]
    longest: int | None
    inputs: Mapping[str, Tensor]


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

    @torch.no_grad()
    def __call__(self, rows: Rows) -> Tensor:
        """Take new tokens in; logits of the last position [B, V]."""
        batch, new = rows.input_ids.shape
        own = {
            "input_ids": rows.input_ids,
            "position_ids": positions(rows.past, new),
            "attention_mask": self._mask(rows, new),
            **rows.inputs,
        }
        values = [
            own[spec.name] if spec.name in own else neutral(spec, batch, self.device)
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
        chosen.copy_(likeliest(logits))
        rows.input_ids[:, 0] = chosen.clamp(min=0)
        past = rows.past
        past += past >= 0
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
