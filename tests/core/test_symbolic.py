"""Fake inputs with named dimensions."""

from __future__ import annotations

from typing import Any, cast

import pytest
import sympy as untyped_sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import Tensor, nn

from fxgraft.errors import GraphError
from fxgraft.frontends.exporting import export
from fxgraft.kernels.spec import dims
from fxgraft.program import Input, Range
from fxgraft.symbolic import (
    check_dynamic,
    derived_dimensions,
    fake_inputs,
    hints_of,
    named_symbols,
)

Symbol = cast(Any, untyped_sympy).Symbol
FLOAT = torch.float32


def hint(size: Any) -> int:
    return size.node.hint


def test_equal_names_share_one_symbol_and_others_do_not() -> None:
    inputs = (Input("x", FLOAT, ("batch", 4, "sequence")), Input("y", FLOAT, ("sequence", "batch")))
    x, y = fake_inputs(inputs, {"batch": Range(), "sequence": Range()})
    assert dims(x)[0] == dims(y)[1]
    assert dims(x)[2] == dims(y)[0]
    assert dims(x)[0] != dims(x)[2]
    assert dims(x)[1] == 4


def test_hints_are_distinct_no_constants_and_within_the_range() -> None:
    names = ("a", "b", "c", "d")
    dimensions = {"a": Range(), "b": Range(30, 40), "c": Range(0, 3), "d": Range(0, 3)}
    inputs = tuple(Input(name, FLOAT, (name,)) for name in names)
    values = fake_inputs(inputs, dimensions, hints={"a": 1, "b": 3})
    found = [hint(value.shape[0]) for value in values]
    assert len(set(found)) == 4
    assert min(found) >= 2
    assert 30 <= found[1] <= 40
    assert max(found[2:]) <= 3


def test_a_derived_dimension_follows_the_others() -> None:
    inputs = (Input("new", FLOAT, ("sequence",)), Input("mask", FLOAT, ("total",)))
    total = Symbol("past") + Symbol("sequence")
    new, mask = fake_inputs(
        inputs, {"sequence": Range(), "total": Range(), "past": Range(0)}, derived={"total": total}
    )
    (past,) = dims(mask)[0].free_symbols - dims(new)[0].free_symbols
    assert dims(mask)[0] == dims(new)[0] + past
    assert hint(mask.shape[0]) == hint(new.shape[0]) + 7


def test_a_graph_that_fixes_a_dimension_is_refused() -> None:
    dimensions = {"rows": Range(), "lines": Range()}
    inputs = (Input("x", FLOAT, ("rows",)), Input("y", FLOAT, ("lines",)))
    values = fake_inputs(inputs, dimensions, hints={"rows": 8, "lines": 9})
    check_dynamic(values)
    with cast(Any, values[0]).fake_mode:
        torch.add(values[0], torch.empty(8))
    with pytest.raises(GraphError, match="'rows' to be 8"):
        check_dynamic(values)
    check_dynamic([torch.empty(2)])


def test_names_hints_and_relations_of_a_captured_program() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return torch.cat([x, x]) + y + z.sum()

    specs = (
        Input("x", FLOAT, ("rows",)), Input("y", FLOAT, ("double",)), Input("z", FLOAT, ("rows",)),
    )  # fmt: skip
    values = {"x": torch.randn(5), "y": torch.randn(10), "z": torch.randn(5)}
    program = export(Pair(), specs, values)
    assert hints_of(program) == {"rows": 5, "double": 10}
    # The graph does not need x and z to be alike, but they have one name.
    assert {str(name) for name in named_symbols(program).values()} == {"rows"}
    assert str(derived_dimensions(program)["double"]) == "2*rows"
