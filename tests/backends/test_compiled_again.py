"""Rewritten and fused graphs under ``torch.compile`` and ``torch.export``: schemas are true."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.fx import GraphModule

from fxgraft.backends.triton.fuse import fused
from fxgraft.frontends.capture import capture
from fxgraft.kernels.spec import dims
from fxgraft.paging import PagedProgram, page_state
from fxgraft.passes.dsla import Dsla
from fxgraft.passes.optimize import Optimize
from fxgraft.program import Input, Program
from fxgraft.state import insert_state
from fxgraft.transform import apply
from tests import models

FREE = {"batch", "sequence", "total", "pages"}
"""Sizes that ``torch.export`` has to keep free."""


def ids(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, models.VOCABULARY, (batch, length), generator=generator)


@dataclass(frozen=True)
class Case:
    """A graph and values for it, by batch and length."""

    module: GraphModule
    inputs: Sequence[Input]
    values: Callable[[int, int], list[Tensor]]


def whole(program: Program) -> Case:
    """The graph that passes rewrote."""
    return Case(program.graph_module, program.inputs, lambda *size: program.bind(ids(*size)))


def paged(program: Program) -> Case:
    """The graph that the Triton backend runs: fused, its state in pools."""
    pages = page_state(insert_state(program))
    return Case(
        fused(pages, fresh=False), pages.program.inputs, lambda *size: _values(pages, *size)
    )


def _values(pages: PagedProgram, batch: int, length: int) -> list[Tensor]:
    """First tokens of some rows, each with blocks and a slot of its own."""
    known = {
        "input_ids": ids(batch, length),
        "attention_mask": torch.ones(batch, length, dtype=torch.int64),
        "position_ids": torch.arange(length).expand(batch, length).contiguous(),
        "past": torch.zeros(batch, dtype=torch.int32),
        "slots": torch.arange(1, batch + 1),
    }
    nodes = {node.name: node for node in pages.program.placeholders}
    found: list[Tensor] = []
    for spec in pages.program.inputs:
        if spec.name in known:
            found.append(known[spec.name])
        elif spec.name.startswith("table_"):
            shape = (int(spec.shape[0]), batch, 2)
            found.append(torch.arange(1, 1 + torch.Size(shape).numel()).int().reshape(shape))
        else:
            size = [int(one) for one in dims(nodes[spec.name])[1:]]
            found.append(torch.zeros(64, *size, dtype=spec.dtype))
    return found


def _linear() -> Program:
    return apply(capture(models.llama()), Dsla(count=2))


CASES: dict[str, Callable[[], Case]] = {
    "dsla": lambda: whole(_linear()),
    "dsla, fused": lambda: paged(apply(_linear(), Optimize())),
    "gemma2, fused": lambda: paged(apply(capture(models.gemma2()), Optimize())),
    "llama, fused": lambda: paged(apply(capture(models.llama()), Optimize())),
    "mamba, fused": lambda: paged(apply(capture(models.mamba()), Optimize())),
}


@cache
def case(name: str) -> Case:
    return CASES[name]()


def results(module: Any, values: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and the inputs as a call leaves them."""
    copies = [value.clone() for value in values]
    with torch.no_grad():
        outputs = module(*copies)
    return [*([outputs] if isinstance(outputs, Tensor) else outputs), *copies]


@pytest.mark.parametrize("name", CASES)
def test_torch_compile_takes_the_graph_whole(name: str) -> None:
    one = case(name)
    module: Any = torch.compile(one.module, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((2, 5), (3, 7)):
        values = one.values(*size)
        torch.testing.assert_close(results(module, values), results(one.module, values))


@pytest.mark.parametrize("name", CASES)
def test_torch_export_keeps_sizes_free(name: str) -> None:
    one = case(name)
    dynamic = tuple(
        {place: Dim.DYNAMIC for place, size in enumerate(spec.shape) if size in FREE}
        for spec in one.inputs
    )
    exported = torch.export.export(
        one.module, tuple(one.values(2, 5)), dynamic_shapes=dynamic, strict=False
    )
    values = one.values(3, 7)
    torch.testing.assert_close(results(exported.module(), values), results(one.module, values))
