"""Paged graphs: rows at any pasts, in scattered blocks, give what the whole sequence gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxgraft.frontends.capture import capture
from fxgraft.kernels import spec as specs
from fxgraft.paged_model import PagedModel, Rows
from fxgraft.paging import PagedProgram, page_state
from fxgraft.program import Program
from fxgraft.state import insert_state
from tests import models

FAMILIES = [models.llama, models.mistral, models.gemma2, models.gpt2, models.opt, models.mamba,
            models.jamba]  # fmt: skip
BLOCK, PAGES = 4, 8


@pytest.fixture(params=["own form", "dense"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With each op's own form on pools, and with the one that works for any op."""
    if request.param == "dense":
        known = specs._SPECS  # pyright: ignore[reportPrivateUsage]
        for name, spec in known.items():
            monkeypatch.setitem(known, name, replace(spec, in_place=lambda node, masks: None))
    return str(request.param)


class Serving:
    """Requests with blocks and slots of their own, run in any mix."""

    def __init__(self, program: Program, requests: int) -> None:
        self.paged: PagedProgram = page_state(insert_state(program), block_size=BLOCK)
        self.ops = sum(len(group.layers) for group in self.paged.groups)
        generator = torch.Generator().manual_seed(3)
        needed = [len(group.layers) * requests * PAGES for group in self.paged.groups]
        module = self.paged.program.graph_module
        self.model = PagedModel(
            self.paged,
            lambda values, *, fresh: module(*values)[0],
            blocks=[count + 1 for count in needed],
            slots=requests + 1,
        )
        for pools in self.model.block_pools:
            for pool in pools:
                pool.fill_(torch.nan)
        self.tables = [
            (torch.randperm(count, generator=generator) + 1)
            .to(torch.int32)
            .view(len(group.layers), requests, PAGES)
            for group, count in zip(self.paged.groups, needed, strict=True)
        ]
        self.past = [0] * requests

    def step(self, rows: list[int | None], tokens: Tensor) -> Tensor:
        """One call on these requests; None stands for a row without a request."""
        past = [-1 if row is None else self.past[row] for row in rows]
        tables = []
        for table in self.tables:
            chosen = torch.zeros(table.shape[0], len(rows), PAGES, dtype=torch.int32)
            for place, row in enumerate(rows):
                if row is not None:
                    chosen[:, place] = table[:, row]
            tables.append(chosen)
        logits = self.model(
            Rows(
                tokens,
                torch.tensor(past, dtype=torch.int32),
                torch.tensor([0 if row is None else row + 1 for row in rows]),
                tables,
                max(past),
                {},
            )
        )
        for row in rows:
            if row is not None:
                self.past[row] += tokens.shape[1]
        return logits


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_mixed_rows_equal_the_whole(build: Callable[[], nn.Module], form: str) -> None:
    model = build()
    program = capture(model)
    ids = torch.randint(3, models.VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    serving = Serving(program, requests=3)
    # Two requests are prefilled, one of them in chunks; then rows join, idle and change places.
    plan: list[tuple[list[int | None], int]] = [
        ([0], 9), ([1], 5), ([1], 2), ([0, 1], 1), ([1, None, 0], 1), ([2], 11), ([2, 1, 0], 1),
        ([None, 2], 1), ([1, 0, None, 2], 1), ([0, 2], 1), ([0, 2], 1),
    ]  # fmt: skip
    for rows, count in plan:
        tokens = torch.zeros(len(rows), count, dtype=torch.int64)
        for place, row in enumerate(rows):
            if row is not None:
                start = serving.past[row]
                tokens[place] = ids[row, start : start + count]
        logits = serving.step(rows, tokens)
        for place, row in enumerate(rows):
            if row is not None:
                wanted = whole[row, serving.past[row] - 1]
                torch.testing.assert_close(logits[place], wanted, atol=2e-4, rtol=2e-4)
    assert form in ("own form", "dense")


def test_blocks_outside_a_window_are_never_read() -> None:
    model: Any = models.mistral()
    program = capture(model)
    window = model.config.sliding_window
    serving = Serving(program, requests=1)
    [group] = serving.paged.groups
    assert group.limit == window - 1
    ids = torch.randint(3, models.VOCABULARY, (1, 28), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    serving.step([0], ids[:, :16])
    for position in range(16, 28):
        gone = max(position - (window - 1), 0) // BLOCK
        for pool in serving.model.block_pools[0]:
            pool[serving.tables[0][:, 0, :gone].flatten().long()] = torch.nan
        serving.tables[0][:, 0, :gone] = 0
        logits = serving.step([0], ids[:, position : position + 1])
        torch.testing.assert_close(logits, whole[:, position], atol=2e-4, rtol=2e-4)
