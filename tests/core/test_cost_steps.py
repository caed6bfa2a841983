"""Work of steps: what it depends on, and the memory it needs, against real runs and by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fxgraft.cost import cost_table
from fxgraft.cost_table_fit import fit
from fxgraft.cost_table_grid import Array, interpolate
from fxgraft.element_types import ElementTypes
from fxgraft.errors import InputError, LoweringError
from fxgraft.frontends.capture import capture
from fxgraft.program import Program
from fxgraft.state import insert_state
from fxgraft.step_costs import StepGraph, Work
from fxgraft.step_memory import activation_bytes, state_memory, weight_bytes
from fxgraft.step_tables import graph_hash
from tests import models


@cache
def program(name: str) -> Program:
    return capture(getattr(models, name)())


@cache
def graph(name: str, types: str = "") -> StepGraph:
    return StepGraph(program(name), ElementTypes.parse(types) if types else None)


def rows(work: Work, kind: str) -> list[int]:
    return [place for place, node in enumerate(work.nodes) if node.kind == kind]


def run_step(name: str, batch: int, new: int, past: int) -> int:
    """Operations that torch counts in one step: linear layers, as attention is an op of ours."""
    step = insert_state(program(name))
    sizes = {"batch": batch, "sequence": new, "past": past, "total": past + new}
    inputs: list[Tensor] = []
    for spec in step.program.inputs:
        shape = [sizes[s] if isinstance(s, str) and s in sizes else s for s in spec.shape]
        shape = [min(past, int(s.split("_")[1])) if isinstance(s, str) else s for s in shape]
        inputs.append(torch.ones(shape, dtype=spec.dtype))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        step.program.graph_module(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("size", [(1, 7, 0), (3, 1, 12), (2, 4, 9)])
def test_linear_layers_of_a_step_equal_torchs_counter(
    name: str, size: tuple[int, int, int]
) -> None:
    work = graph(name).work(*size)
    assert work.flops[rows(work, "linear")].sum() == run_step(name, *size)


def test_what_work_depends_on() -> None:
    scopes = {(node.kind, node.scope) for node in graph("llama").nodes}
    assert {("linear", "tokens"), ("linear", "sequences"), ("attention", "context")} <= scopes
    assert {node.scope for node in graph("llama").nodes if node.kind == "linear"} == {
        "tokens", "sequences",
    }  # fmt: skip
    # A recurrence keeps state per sequence, whatever its context.
    assert {n.scope for n in graph("mamba").nodes if n.kind == "recurrence"} == {"context"}


@pytest.mark.parametrize("name", ["llama", "gemma2", "jamba", "mamba", "gpt2"])
def test_scopes_are_right(name: str) -> None:
    """Work by tokens is the same however they are spread; by sequences, whatever their length."""
    steps = graph(name)
    one, other = steps.work(1, 12, 0), steps.work(4, 3, 8)
    longer = steps.work(4, 5, 2)
    for place, node in enumerate(steps.nodes):
        for field in ("flops", "bytes_read", "bytes_written"):
            values = [float(getattr(work, field)[place, 0]) for work in (one, other, longer)]
            if node.scope == "tokens" and "batch" in str(node.row.cost.flops):
                assert values[0] == values[1], node.row
            if node.scope == "sequences":
                assert values[1] == values[2], node.row


@pytest.mark.parametrize(("new", "past"), [(1, 0), (1, 9), (5, 0), (6, 7)])
def test_attention_leaves_out_what_is_masked(new: int, past: int) -> None:
    work = graph("llama").work(2, new, past)
    seen = sum(past + place + 1 for place in range(new))
    heads, head_dim = 4, 16
    for place in rows(work, "attention"):
        assert work.flops[place, 0] == 2 * 2 * heads * seen * 2 * head_dim


def test_state_is_appended_in_place() -> None:
    work = graph("llama").work(2, 3, 10)
    new = 2 * 3 * 2 * 16 * 4
    found = [p for p, n in enumerate(work.nodes) if n.row.name.startswith("cat_default")]
    assert len(found) == 6
    for place in found:
        assert (work.bytes_read[place, 0], work.bytes_written[place, 0]) == (new, new)


def test_a_window_bounds_what_is_read() -> None:
    work = graph("mistral").work(1, 1, [3, 5, 50])
    place = rows(work, "attention")[0]
    keys = np.asarray([4, 6, 6])
    assert (work.flops[place] == 2 * 4 * keys * 2 * 16).all()


def test_experts_that_no_row_meets_are_not_read() -> None:
    work = graph("jamba").work(1, [1, 64], 0)
    grouped = [p for p, n in enumerate(work.nodes) if n.product and n.product.is_grouped]
    assert grouped
    for place in grouped:
        product = work.nodes[place].product
        assert product is not None
        assert (product.copies, work.rows[place].tolist()) == (4, [2, 128])
        assert work.active[place].tolist() == [2, 4]
        matrix = product.outputs * product.reduction * 4
        vectors = np.asarray([2, 128]) * product.reduction * 4
        offsets = 4 * 4
        assert work.bytes_read[place] == pytest.approx(
            vectors + offsets + np.asarray([2, 4]) * matrix
        )


@pytest.mark.parametrize(("types", "scale"), [("float16", 0.5), ("int8", 0.25), ("int4", 0.125)])
def test_other_data_types_scale_bytes_and_nothing_else(types: str, scale: float) -> None:
    own, other = graph("llama").work(2, 5, 7), graph("llama", types).work(2, 5, 7)
    assert (own.flops == other.flops).all()
    for kind in ("linear", "attention"):
        places = rows(own, kind)
        whole = own.bytes[places].sum(), other.bytes[places].sum()
        masks = 3 * 2 * 12 if kind == "attention" else 0  # one byte each, whatever the type
        assert whole[1] - masks == pytest.approx(scale * (whole[0] - masks))


def test_each_role_has_its_type() -> None:
    mixed = StepGraph(program("llama"), ElementTypes("int4", "int16", "int8"))
    work = mixed.work(1, 1, 9)
    linear = next(p for p, n in enumerate(work.nodes) if n.row.module.endswith("q_proj"))
    assert work.bytes_read[linear, 0] == 64 * 64 * 0.5 + 64 * 2
    assert work.bytes_written[linear, 0] == 64 * 2
    attention = rows(work, "attention")[0]
    state, query, mask = 2 * 2 * 10 * 16 * 1, 64 * 2, 10
    assert work.bytes_read[attention, 0] == state + query + mask


@pytest.mark.parametrize("name", ["float12", "int0", "int64", ""])
def test_unknown_data_types(name: str) -> None:
    with pytest.raises(InputError, match="data type of weights"):
        ElementTypes.parse(name)


def test_the_types_of_a_program() -> None:
    half = capture(models.llama(num_hidden_layers=1).to(torch.bfloat16))
    assert ElementTypes.of(half) == ElementTypes.parse("bfloat16")
    assert ElementTypes("int4", "float16", "float16").products == "float16"
    whole = program("llama")
    table = cost_table(whole, {"batch": 2, "sequence": 3}, ElementTypes.of(whole))
    assert table.total == whole.cost(batch=2, sequence=3).total


def test_a_program_without_steps_is_costed_whole() -> None:
    from tests.core.test_cost import bert

    steps = StepGraph(bert()[1])
    assert steps.without_steps
    assert not steps.states
    work = steps.work(2, 9, 0)
    assert int(work.flops.sum()) == bert()[1].cost(batch=2, sequence=9).total.flops
    attention = [node.scope for node in steps.nodes if node.kind == "attention"]
    assert attention == ["context", "context"]


def test_a_dimension_that_is_neither_batch_nor_tokens() -> None:
    class Image(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    dynamic = {"x": {0: "batch", 1: "height"}}
    steps = StepGraph(capture(Image(), (torch.randn(2, 5, 3),), dynamic=dynamic))
    with pytest.raises(InputError, match="depends on 'height'"):
        steps.work(1, 1, 0)


def test_unknown_operators_are_named() -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.inverse(x)

    steps = StepGraph(capture(Inverse(), (torch.eye(3).repeat(2, 1, 1),)))
    with pytest.raises(LoweringError, match=r"\(aten\.inverse\) .* has no cost"):
        steps.require_known()


def test_memory_of_state() -> None:
    state = {name: state_memory(graph(name).states, ElementTypes.parse("float16"))
             for name in ("llama", "gemma2", "jamba", "mamba")}  # fmt: skip
    assert state["llama"] == ([(None, 3 * 2 * 2 * 16 * 2)], 0)
    # Two layers keep the newest token and 5 before it.
    assert dict(state["gemma2"][0]) == {6: 2 * 2 * 2 * 16 * 2, None: 2 * 2 * 16 * 2}
    assert state["mamba"] == ([], 2 * 64 * (3 + 8) * 2)
    assert state["jamba"][1] > 0 < len(state["jamba"][0])


def test_memory_of_weights_counts_shared_ones_once() -> None:
    tied = capture(models.llama(num_hidden_layers=1, tie_word_embeddings=True))
    own = weight_bytes(tied, ElementTypes.of(tied))
    assert own == tied.count_bytes()
    assert weight_bytes(tied, ElementTypes.parse("int4")) == -(-own // 8)


def test_memory_of_activations() -> None:
    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.exp()
            z = y.sin() + y
            return z.view(-1, 4).cos()

    dynamic = {"x": {0: "batch", 1: "sequence"}}
    chain = capture(Chain(), (torch.randn(2, 5, 4),), dynamic=dynamic)
    # y, its sine and their sum are alive at once; the input belongs to the caller.
    assert activation_bytes(chain, ElementTypes.parse("float32"), 100) == (0, 3 * 16)
    assert activation_bytes(chain, ElementTypes.parse("float16"), 100) == (0, 3 * 8)


def test_activations_of_a_model_grow_with_its_widest_values() -> None:
    step = insert_state(program("llama")).program
    _, per_token = activation_bytes(step, ElementTypes.parse("float32"), 64)
    # At least the perceptron's two hidden values and the residual, at most all values together.
    everything = float(graph("llama").work(1, 1, 0).bytes_written.sum())
    assert (2 * 96 + 64) * 4 <= per_token <= everything


def test_the_hash_of_a_graph() -> None:
    first = graph_hash(program("llama"))
    assert graph_hash(program("llama").copy()) == first
    assert graph_hash(capture(models.llama())) == first
    assert graph_hash(capture(models.llama(num_hidden_layers=2))) != first
    assert graph_hash(program("gpt2")) != first


def values(function: Callable[..., Any]) -> Callable[[list[Array]], Array]:
    return lambda points: np.stack([np.asarray(function(*points), np.float64)])


def test_knots_of_a_piecewise_linear_function_are_exact() -> None:
    def function(x: Array) -> Array:
        return np.maximum(100 + x, 3 * x)

    (knots,), table = fit(values(function), [(1, 5000)], tolerance=1e-6)
    points = np.arange(1, 5001, dtype=np.float64)
    found = interpolate([knots], table[0], [points])
    assert np.abs(found / function(points) - 1).max() < 2e-6
    assert len(knots) < 40


def test_knots_follow_a_curve_on_two_axes() -> None:
    def function(x: Array, y: Array) -> Array:
        return 5 + x * (y + x / 2)

    knots, table = fit(values(function), [(1, 900), (0, 700)], tolerance=1e-2)
    x, y = (np.asarray(p, np.float64) for p in zip(*itertools.product(range(1, 900, 7),
            range(0, 700, 11)), strict=True))  # fmt: skip
    found = interpolate(knots, table[0], [x, y])
    assert np.abs(found / function(x, y) - 1).max() < 1.5e-2
    assert (knots[0][0], knots[0][-1], knots[1][0], knots[1][-1]) == (1, 900, 0, 700)


def test_knots_are_not_spent_on_what_does_not_matter() -> None:
    curve = values(lambda x: x**2)  # pyright: ignore[reportUnknownLambdaType]
    (many,), _ = fit(curve, [(1, 4096)], tolerance=1e-3)
    (few,), table = fit(curve, [(1, 4096)], tolerance=1e-3, floor=[4096.0**2])
    assert len(few) < len(many) <= 65
    points = np.arange(1, 4097, dtype=np.float64)
    error = np.abs(interpolate([few], table[0], [points]) - points**2).max()
    assert error < 2e-3 * 4096**2


def test_a_range_of_one_point() -> None:
    (knots,), table = fit(values(lambda x: x * 2), [(1, 1)])  # pyright: ignore[reportUnknownLambdaType]
    assert (knots, table.tolist()) == ((1,), [[2.0]])
