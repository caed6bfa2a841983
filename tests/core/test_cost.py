"""Cost tables against torch's own counter, against real tensors, and against hand counts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
import sympy as untyped_sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
import transformers
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxgraft.cost import CostTable
from fxgraft.errors import InputError
from fxgraft.frontends.capture import capture
from fxgraft.frontends.exporting import export
from fxgraft.program import Input, Program
from fxgraft.state import insert_state
from tests import models

sympy = cast(Any, untyped_sympy)
B, S = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("batch", "sequence"))
PRODUCTS = ("linear", "mm", "matmul", "conv", "attention", "einsum")


@cache
def llama() -> tuple[nn.Module, Program]:
    model = models.llama(attn_implementation="eager")
    return model, capture(model)


def bert() -> tuple[nn.Module, Program]:
    library = cast(Any, transformers)
    config = library.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, attn_implementation="eager",
    )  # fmt: skip
    model = library.BertModel(config).eval()
    ids = torch.ones(3, 7, dtype=torch.int64)
    return model, capture(model, {"input_ids": ids, "attention_mask": ids})


class Convolutions(nn.Module):
    """Strided, grouped, dilated, transposed and one-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, dilation=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.line = nn.Conv1d(6, 5, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self.up(self.grouped(self.down(x)).relu()).flatten(2))


class Products(nn.Module):
    """Every way to write a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))
        self.batched = nn.Parameter(torch.randn(6, 5, 7))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 4)
        hidden = torch.addmm(torch.zeros(5), flat, self.weight) + flat.mm(self.weight)
        hidden = hidden.view(x.shape[0], 6, 5) + x @ self.weight
        mixed = torch.baddbmm(torch.zeros(7), hidden.transpose(0, 1), self.batched)
        return torch.einsum("bte,tef->btf", hidden, self.batched) + mixed.transpose(0, 1)


def products_only(table: CostTable) -> int:
    costs = table.by_op().items()
    return sum(int(cost.flops) for op, cost in costs if any(part in op for part in PRODUCTS))


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("build", [llama, bert])
def test_matrix_products_of_a_transformer_equal_torchs_counter(
    build: Callable[[], tuple[nn.Module, Program]],
) -> None:
    model, program = build()
    inputs = program.example(batch=2, sequence=9)
    found = products_only(program.cost(batch=2, sequence=9))
    assert found == counted(lambda: model(**inputs))


@pytest.mark.parametrize(
    ("model", "shape"), [(Convolutions(), (2, 3, 16, 20)), (Products(), (3, 6, 4))]
)
def test_products_and_convolutions_equal_torchs_counter(
    model: nn.Module, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    program = capture(model.eval(), (x,))
    assert products_only(program.cost(batch=5)) == counted(
        lambda: model(torch.randn(5, *shape[1:]))
    )


class Traffic(Interpreter):
    """Runs a graph and counts the bytes of every node from its actual tensors."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.read: dict[str, int] = {}
        self.written: dict[str, int] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor):
            inputs = [v for v in map(self.env.get, n.all_input_nodes) if isinstance(v, Tensor)]
            memory = {v.untyped_storage().data_ptr() for v in inputs}
            if result.untyped_storage().data_ptr() not in memory:
                self.read[n.name] = sum(map(stored_bytes, inputs))
                self.written[n.name] = stored_bytes(result)
        return result


def stored_bytes(value: Tensor) -> int:
    """Bytes of the distinct elements: an expanded dimension is stored once."""
    for axis, stride in enumerate(value.stride()):
        if stride == 0:
            value = value.narrow(axis, 0, 1)
    return value.nbytes


@pytest.mark.parametrize("build", [llama, bert])
def test_bytes_equal_those_of_real_tensors(
    build: Callable[[], tuple[nn.Module, Program]],
) -> None:
    program = build()[1]
    traffic = Traffic(program)
    with torch.no_grad():
        inputs = program.bind(**program.example(batch=3, sequence=8))
        traffic.run(*(value.contiguous() for value in inputs))
    rows = program.cost(batch=3, sequence=8).rows
    assert {row.name for row in rows} == set(traffic.read)
    assert any(row.op == "aten.contiguous" for row in rows)
    for row in rows:
        assert row.cost.bytes_written == traffic.written[row.name], row
        if row.op not in ("aten.embedding", "aten.gather"):
            assert row.cost.bytes_read == traffic.read[row.name], row


def test_a_table_is_read_by_the_row() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(1000, 16)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            rows = self.table(ids)
            return rows, rows.flatten(0, 1)[ids[:, 0]]

    table = capture(Rows(), {"ids": torch.ones(3, 5, dtype=torch.int64)}).cost(batch=7)
    first, second = (row.cost for row in table.rows)
    assert (first.bytes_read, first.bytes_written) == (7 * 5 * (64 + 8), 7 * 5 * 64)
    assert (second.bytes_read, second.bytes_written) == (7 * (64 + 8), 7 * 64)
    assert table.total.flops == 0


X = torch.randn(4, 6, 8)
IMAGE = torch.randn(2, 3, 8, 8)
INDEX = torch.zeros(4, dtype=torch.int64)
HAND_COUNTS: dict[str, tuple[Callable[[Tensor], Any], Tensor, int]] = {
    "add": (lambda x: x + 1, X, 192),
    "exponential": (torch.exp, X, 192),
    "cast": (lambda x: x.to(torch.float64), X, 0),
    "no cast": (lambda x: x.to(torch.float32), X, 0),
    "softmax": (lambda x: x.softmax(-1), X, 5 * 192),
    "log softmax": (lambda x: x.log_softmax(-1), X, 6 * 192),
    "layer norm": (lambda x: F.layer_norm(x, (8,)), X, 7 * 192),
    "rms norm": (lambda x: F.rms_norm(x, (8,)), X, 4 * 192),
    "sum": (lambda x: x.sum(-1), X, 192),
    "variance": (lambda x: x.var(-1), X, 4 * 192),
    "maximum": (lambda x: x.max(), X, 192),
    "all true": (lambda x: torch.ops.aten._is_all_true(x > 0), X, 2 * 192),
    "cumulative sum": (lambda x: x.cumsum(1), X, 192),
    "comparison": (lambda x: x > 0, X, 192),
    "where": (lambda x: torch.where(x > 0, x, 0.0), X, 2 * 192),
    "concatenation": (lambda x: torch.cat([x, x]), X, 0),
    "views": (lambda x: x.transpose(0, 1)[1:].unsqueeze(0).expand(3, -1, -1, -1), X, 0),
    "average pooling": (lambda x: F.avg_pool2d(x, 2), IMAGE, 2 * 3 * 16 * 4),
    "maximum pooling": (lambda x: F.max_pool2d(x, (2, 4)), IMAGE, 2 * 3 * 8 * 8),
    "adaptive pooling": (lambda x: F.adaptive_avg_pool2d(x, 2), IMAGE, 384),
    "upsampling": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), IMAGE, 12288),
    "matrix and vector": (lambda x: x[0] @ x[0, 0], X, 2 * 6 * 8),
    "dot product": (lambda x: x[0, 0] @ x[0, 1], X, 2 * 8),
    "outer product": (lambda x: torch.outer(x[0, 0], x[0, 1]), X, 64),
    "broadcast product": (lambda x: x @ x[0].T, X, 2 * 4 * 6 * 6 * 8),
    "einsum": (lambda x: torch.einsum("abc,abd->acd", x, x), X, 2 * 4 * 6 * 8 * 8),
    "einsum of three": (
        lambda x: torch.einsum("abc,cd,de->abe", x, x[0, :, :].T, x[1]),
        X,
        2 * 4 * 6 * 8 * 6 + 2 * 4 * 6 * 6 * 8,
    ),
    "einsum with ellipsis": (
        lambda x: torch.einsum("...c,...c->...", x, x[0]), X, 2 * 4 * 6 * 8,
    ),
    "elementwise einsum": (lambda x: torch.einsum("abc,bc->abc", x, x[0]), X, 192),
    "attention": (
        lambda x: F.scaled_dot_product_attention(x, x, x[..., :4]), X, 2 * 4 * 6 * 6 * (8 + 4),
    ),
    "index add": (lambda x: torch.zeros(9, 6, 8).index_add(0, INDEX, x), X, 192),
    "scatter add": (
        lambda x: torch.zeros(4, 6, 8).scatter_add(0, torch.zeros_like(x, dtype=torch.int64), x),
        X,
        192,
    ),
    "index put": (lambda x: torch.zeros(9, 6, 8).index_put((INDEX,), x), X, 0),
    "in place": (lambda x: x.clone().mul_(2), X, 192),
    "nothing": (lambda x: F.dropout(x, training=False) + 0 * x, X, 384),
}  # fmt: skip


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize("name", HAND_COUNTS)
def test_hand_counted_operations(name: str) -> None:
    function, x, flops = HAND_COUNTS[name]
    spec = Input("x", torch.float32, tuple(x.shape))
    table = export(Apply(function), (spec,), {"x": x}).cost()
    assert table.unknown == {}
    assert table.total.flops == flops


def test_an_operator_without_a_rule_is_listed() -> None:
    x = torch.randn(3, 4, 4)
    table = capture(Apply(torch.inverse), (x,)).cost(batch=2)
    assert table.unknown == {"aten.inverse": 1}
    row = next(row for row in table.rows if row.op == "aten.inverse")
    assert (row.cost.flops, row.cost.bytes_read) == (0, 2 * 16 * 4)
    assert "without a rule, flops missing: aten.inverse (1)" in str(table)
    assert table.to_json()["unknown"] == {"aten.inverse": 1}


def test_expressions_are_over_dimension_names() -> None:
    table = llama()[1].cost()
    assert table.dimensions == ("batch", "sequence")
    assert table.total.flops.free_symbols == {B, S}
    assert sympy.degree(table.total.flops, S) == 2
    linear = table.by_op()["aten.linear"].flops
    assert sympy.expand(linear - linear.coeff(B * S) * B * S) == 0


def test_sizes_can_be_put_in_early_late_or_both() -> None:
    program = llama()[1]
    whole = program.cost().evaluate(batch=3, sequence=17)
    assert all(isinstance(value, int) for value in whole)
    assert whole.flops == program.cost(batch=3, sequence=17).total.flops
    assert whole == program.cost(batch=3).evaluate(sequence=17)
    assert program.cost(batch=3).dimensions == ("sequence",)
    assert whole == program.cost(batch=3, sequence=17).evaluate()


def test_a_grid_gives_what_its_points_give() -> None:
    table = capture(models.mistral()).cost()
    batch, sequence = np.arange(1, 5)[:, None], np.arange(1, 20)
    grid = table.evaluate(batch=batch, sequence=sequence)
    assert cast(Any, grid.flops).shape == (4, 19)
    for b in (1, 4):
        for s in (3, 6, 7, 19):
            point = table.evaluate(batch=b, sequence=s)
            assert [cast(Any, v)[b - 1, s - 1] for v in grid] == list(point)


def test_wrong_names_are_refused() -> None:
    program = llama()[1]
    with pytest.raises(InputError, match="no dynamic dimension 'length'"):
        program.cost(length=3)
    with pytest.raises(InputError, match="no dynamic dimension 'length'"):
        program.cost().evaluate(batch=1, sequence=2, length=3)
    with pytest.raises(InputError, match="size of dimension 'sequence' is missing"):
        program.cost().evaluate(batch=1)


def test_groups_add_up_to_the_total() -> None:
    table = llama()[1].cost(batch=2, sequence=5)
    for groups in (table.by_layer(), table.by_op()):
        for field in ("flops", "bytes_read", "bytes_written", "state_bytes"):
            total = sum(getattr(cost, field) for cost in groups.values())
            assert total == getattr(table.total, field)
    layers = table.by_layer()
    assert layers["model.layers.0"] == layers["model.layers.2"]
    assert layers["lm_head"].flops == 2 * 2 * 5 * 64 * models.VOCABULARY
    assert next(iter(layers)) == "model.embed_tokens"


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        # Layers x (key and value) x heads x head dimension x bytes.
        (models.llama, 3 * 2 * 2 * 16 * 4 * B * S),
        # A window of 6 keeps 5 past tokens.
        (models.mistral, 3 * 2 * 2 * 16 * 4 * B * sympy.Min(S, 5)),
        # Layers x channels x (3 past inputs and 8 states) x bytes; its size is fixed.
        (models.mamba, 2 * 64 * (3 + 8) * 4 * B),
    ],
)
def test_state_bytes(build: Callable[[], nn.Module], expected: Any) -> None:
    assert sympy.expand(capture(build()).cost().total.state_bytes - expected) == 0


def test_an_encoder_keeps_no_state() -> None:
    assert bert()[1].cost().total.state_bytes == 0


def test_a_step_graph_costs_by_past_and_new_tokens() -> None:
    table = insert_state(llama()[1]).program.cost()
    assert {"batch", "sequence", "past"} <= set(table.dimensions)
    sizes = {"batch": 1, "past": 100, "sequence": 1, "total": 101}
    sizes = {name: size for name, size in sizes.items() if name in table.dimensions}
    assert table.evaluate(**sizes).state_bytes == 3 * 2 * 2 * 16 * 4 * 101
    attention = table.by_op()["fxgraft.attention"].flops
    named = {symbol: sizes[str(symbol)] for symbol in attention.free_symbols}
    assert cast(Any, attention).subs(named) == 3 * 2 * 4 * 101 * (16 + 16)


def test_text_and_json() -> None:
    program = llama()[1]
    table = program.cost()
    lines = str(table).splitlines()
    assert lines[0].split() == ["op", "nodes", "flops", "read", "written", "state"]
    assert lines[-1].startswith("total")
    assert max(map(len, lines)) < 200
    document = json.loads(json.dumps(table.to_json()))
    assert document["dimensions"] == ["batch", "sequence"]
    assert len(document["rows"]) == len(table.rows)
    assert sympy.sympify(document["total"]["state_bytes"], {"batch": B, "sequence": S}) == (
        table.total.state_bytes
    )
    numbers = program.cost(batch=1000, sequence=1000)
    assert numbers.to_json()["total"]["flops"] == int(numbers.total.flops)
    assert f"{int(numbers.total.flops) / 1e9:.3g} G" in str(numbers).splitlines()[-1]


def test_a_large_program_is_fast() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.norm(x)
            for _ in range(6):
                hidden = torch.sin(hidden) * hidden + hidden.transpose(0, 1).transpose(0, 1)
            return x + self.narrow(F.gelu(self.wide(hidden)))

    model = nn.Sequential(*(Block() for _ in range(32)))
    sizes = {"input": {0: "batch", 1: "sequence"}}
    program = capture(model, (torch.randn(3, 5, 8),), dynamic=sizes)
    assert len(program.graph.nodes) > 1000
    start = time.process_time()
    work = program.cost().evaluate(batch=np.arange(1, 1001), sequence=np.arange(1, 1001))
    assert time.process_time() - start < 1.0
    assert cast(Any, work.flops).shape == (1000,)
