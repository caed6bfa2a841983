"""Graph diffs: what counts as a difference, laws, text, and JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.diff import Detail, GraphDiff, NamedChange, NodeChange, diff
from fxgraft.diff_text import collapse, shorten, spans
from fxgraft.errors import SerializationError
from fxgraft.program import Program, Range
from tests.core._edits import (
    WIDTH,
    bypass,
    find,
    insert_behind,
    llama,
    merged,
    net,
    program_of,
    pruned,
    renamed,
    renumbered,
    steered,
)

aten = torch.ops.aten
Golden = Callable[[str, str], None]


def mirror(found: GraphDiff) -> GraphDiff:
    """The diff that the swapped Programs must have, but for the order."""
    swapped = {"added": "removed", "removed": "added"}

    def named(changes: Iterable[NamedChange]) -> tuple[NamedChange, ...]:
        return tuple(
            dataclasses.replace(c, kind=swapped.get(c.kind, c.kind), before=c.after, after=c.before)
            for c in changes
        )

    return GraphDiff(
        tuple(
            NodeChange(
                c.module, c.after, c.before,
                tuple(Detail(d.kind, d.name, d.after, d.before) for d in c.details),
            )
            for c in found.nodes
        ),
        named(found.weights), named(found.inputs), named(found.outputs),
    )  # fmt: skip


def contents(found: GraphDiff) -> list[set[object]]:
    """What a diff says, without order."""
    return [set(found.nodes), set(found.weights), set(found.inputs), set(found.outputs)]


def places(changes: Iterable[NodeChange]) -> list[str]:
    return [f"{change.module}:{change.view.label}" for change in changes]


@pytest.mark.parametrize("build", [net, llama])
def test_a_copy_is_no_different(build: Callable[[], Program]) -> None:
    found = diff(build(), build().copy())
    assert not found
    assert str(found) == "no differences"
    assert found.context


@pytest.mark.parametrize("build", [net, llama])
def test_names_and_symbols_do_not_count(build: Callable[[], Program]) -> None:
    program, other = build(), renumbered(build())
    names = [{n.name for n in p.graph.nodes if n.users and n.args} for p in (program, other)]
    assert not names[0] & names[1]
    assert program.symbols != other.symbols
    assert not diff(program, other)


def several() -> dict[str, Program]:
    return {
        "steered": steered(net(), 1, 2, 3),
        "merged": merged(net()),
        "pruned": pruned(net(), 2),
        "steered_and_merged": merged(steered(net(), 2)),
    }


@pytest.mark.parametrize("name", ["steered", "merged", "pruned", "steered_and_merged"])
def test_text(name: str, golden: Golden) -> None:
    before, after = net(), several()[name]
    golden(f"diff_{name}", str(diff(before, after)))
    assert contents(mirror(diff(before, after))) == contents(diff(after, before))


def test_insertion_changes_its_readers_only() -> None:
    after = net().copy()
    insert_behind(find(after, "model.layers.0", "add"), aten.relu.default)
    found = diff(net(), after)
    assert places(found.added) == ["model.layers.0:relu"]
    assert places(found.rewired) == ["model.layers.0:add#2", "model.layers.0.mlp_norm:layer_norm"]
    assert not found.removed
    assert not found.changed


def test_insertion_among_equals_is_found_where_it_is() -> None:
    after = net().copy()
    node = find(after, "model.layers.1.self_attn", "transpose", 1)
    insert_behind(insert_behind(node, aten.transpose.int, 1, 2), aten.transpose.int, 1, 2)
    found = diff(net(), after)
    assert len(found.added) == 2
    assert len(found.rewired) == 1
    assert len(found.nodes) == 3


def test_removal() -> None:
    after = net().copy()
    bypass(find(after, "model.layers.3.mlp", "silu"))
    found = diff(net(), after)
    assert places(found.removed) == ["model.layers.3.mlp:silu"]
    assert places(found.rewired) == ["model.layers.3.mlp.down_proj:linear"]
    assert len(found.nodes) == 2


def test_changed_constant() -> None:
    after = net().copy()
    node = find(after, "model.layers.2.mlp_norm", "layer_norm")
    node.update_arg(4, 1e-6)
    (change,) = diff(net(), after).nodes
    assert change.details == (Detail("changed", "eps", ("1e-05",), ("1e-06",)),)


def test_default_given_or_left_out_is_the_same() -> None:
    after = net().copy()
    for node in after.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        node.update_kwarg("alpha", 1)
    assert not diff(net(), after)


def test_both_rewired_and_changed() -> None:
    after = net().copy()
    node = find(after, "model.layers.2.mlp_norm", "layer_norm")
    node.update_arg(4, 1e-6)
    node.update_arg(0, find(after, "model.layers.1", "add", 1))
    (change,) = diff(net(), after).nodes
    assert change.kinds == ("rewired", "changed")


def test_reading_another_weight_rewires() -> None:
    after = net().copy()
    node = find(after, "model.layers.0.mlp.up_proj", "linear")
    with after.graph.inserting_before(node):
        weight = after.graph.create_node("get_attr", "model.layers.1.mlp.up_proj.weight")
    weight.meta["val"] = graphs.evaluate(weight)
    node.update_arg(1, weight)
    (change,) = diff(net(), after).nodes
    assert change.kinds == ("rewired",)
    assert change.details[0].after == ("", "model.layers.1.mlp.up_proj.weight", "")


def test_other_node_of_the_same_name() -> None:
    before, after = net().copy(), net().copy()
    silus = [find(program, "model.layers.0.mlp", "silu") for program in (before, after)]
    insert_behind(silus[0], aten.to.dtype, torch.float16)
    insert_behind(silus[1], aten.to.device, torch.device("cpu"), torch.float16)
    assert "input: mlp.to → another mlp.to" in str(diff(before, after))


def test_swapped_operands_are_rewired() -> None:
    after = net().copy()
    node = find(after, "model.layers.2", "add")
    node.args = (node.args[1], node.args[0])
    (change,) = diff(net(), after).nodes
    assert [detail.name for detail in change.details] == ["self", "other"]


def test_shapes_alone_rewire_nothing() -> None:
    """Query nodes that come to look like the key nodes of before are still the query's."""
    found = diff(llama(), pruned(llama(), 2))
    assert found.changed
    assert not found.rewired
    assert not found.added
    assert not found.removed


class Flat(nn.Module):
    """A chain of functions without submodules, and two branches in the given order."""

    def __init__(self, swapped: bool = False, negated: bool = False) -> None:
        super().__init__()
        self.swapped, self.negated = swapped, negated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.negated:
            x = -x
        if self.swapped:
            right, left = torch.exp(x * 3), torch.exp(x * 2)
        else:
            left, right = torch.exp(x * 2), torch.exp(x * 3)
        return left - right


def flat(**options: bool) -> Program:
    return program_of(Flat(**options), {"x": torch.ones(2, 3)}, {"x": ("batch", 3)})


def test_order_of_independent_nodes_does_not_count() -> None:
    assert not diff(flat(), flat(swapped=True))


def test_one_insertion_in_a_flat_graph() -> None:
    found = diff(flat(), flat(negated=True))
    assert places(found.added) == [":neg"]
    assert places(found.rewired) == [":mul#1", ":mul#2"]
    assert len(found.nodes) == 3
    assert "(top level)" in str(found)


class Weighted(nn.Module):
    """Two weights of one module, read in either order."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
        self.swapped = swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.swapped:
            x = -x
            right, left = x @ self.right, x @ self.left
        else:
            left, right = x @ self.left, x @ self.right
        return left - right


def test_weights_tell_nodes_apart() -> None:
    programs = [
        program_of(Weighted(swapped), {"x": torch.ones(2, 3)}, {"x": ("batch", 3)})
        for swapped in (False, True)
    ]
    found = diff(*programs)
    assert places(found.added) == [":neg"]
    assert [[d.name for d in c.details] for c in found.rewired] == [["self"], ["self"]]


def test_unrelated_programs() -> None:
    found = diff(flat(), net())
    assert len(found.removed) == 5
    assert not found.rewired
    assert {change.kind for change in found.inputs} == {"added", "removed"}
    assert [(c.kind, c.name) for c in found.outputs] == [("removed", "output"), ("added", "logits")]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.zeros(50), "changed"),
        (torch.zeros(50, dtype=torch.float64), "reshaped"),
        (torch.zeros(49), "reshaped"),
        (torch.zeros(50, device="meta"), "changed"),
    ],
)
def test_weights(value: torch.Tensor, kind: str) -> None:
    after = net().copy()
    graphs.set_weight(after.graph_module, "lm_head.bias", value)
    (change,) = diff(net(), after).weights
    assert (change.name, change.kind) == ("lm_head.bias", kind)


def test_equal_weights_in_other_tensors() -> None:
    before, after = net().copy(), net().copy()
    bias = torch.full((50,), math.nan)
    graphs.set_weight(before.graph_module, "lm_head.bias", bias)
    graphs.set_weight(after.graph_module, "lm_head.bias", bias.clone())
    weight = net().weight("lm_head.weight").detach()
    graphs.set_weight(after.graph_module, "lm_head.weight", weight.t().contiguous().t())
    assert not diff(before, after)


def test_weights_added_and_removed() -> None:
    after = net().copy()
    graphs.set_weight(after.graph_module, "extra", torch.ones(3))
    delattr(after.graph_module.get_submodule("lm_head"), "bias")
    found = diff(net(), after)
    assert [(c.kind, c.name) for c in found.weights] == [
        ("removed", "lm_head.bias"),
        ("added", "extra"),
    ]


def test_inputs_and_dimensions() -> None:
    after = net().copy()
    after.inputs = (dataclasses.replace(after.inputs[0], high=40),)
    after.dimensions = {**after.dimensions, "batch": Range(1, 8)}
    found = diff(net(), after)
    assert [(c.kind, c.name) for c in found.inputs] == [
        ("changed", "input_ids"),
        ("changed", "batch"),
    ]
    assert "dimension of 1 to any size → dimension of 1 to 8" in str(found)


def test_outputs() -> None:
    after = net().copy()
    inner = find(after, "model.layers.3", "add", 1)
    logits = after.output_nodes["logits"]
    after.graph.output_node().args = ((inner, logits),)
    after.outputs = ("logits", "scores")
    found = diff(net(), after)
    assert [(c.kind, c.name) for c in found.outputs] == [("rewired", "logits"), ("added", "scores")]
    assert found.outputs[0].after == "float32[batch, sequence, 8] from model.layers.3.add#2"


def test_shape_of_an_output() -> None:
    after = net().copy()
    graphs.set_weight(after.graph_module, "lm_head.weight", torch.ones(9, WIDTH))
    graphs.set_weight(after.graph_module, "lm_head.bias", torch.ones(9))
    graphs.propagate(after.graph_module)
    found = diff(net(), after)
    assert [(c.kind, c.name) for c in found.outputs] == [("changed", "logits")]
    assert places(found.changed) == ["lm_head:linear"]


def test_json() -> None:
    found = diff(net(), merged(steered(net(), 2)))
    again = GraphDiff.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert str(again) == str(found)
    assert GraphDiff.from_json(GraphDiff().to_json()) == GraphDiff()


@pytest.mark.parametrize("data", [{"nodes": 3}, {"nodes": [{"module": "m"}]}, {"weights": ["w"]}])
def test_json_of_something_else(data: dict[str, object]) -> None:
    with pytest.raises(SerializationError, match=next(iter(data))):
        GraphDiff.from_json(data)


def test_every_value_of_a_flat_graph_changed() -> None:
    class Long(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.dtype = dtype

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.to(self.dtype)
            for _ in range(40):
                x = (x * 2).sin() + 1
            return x

    programs = [
        program_of(Long(dtype), {"x": torch.ones(2, 3)}, {"x": ("batch", 3)})
        for dtype in (torch.float64, torch.float16)
    ]
    found = diff(*programs)
    assert len(found.changed) == len(found.nodes) == 121


# Laws over random edits.

_UNARY = (aten.relu.default, aten.sin.default, aten.neg.default)
Edit = tuple[str, int, int]


def _apply(program: Program, edit: Edit) -> None:
    """Make one edit that keeps every shape; ``where`` and ``which`` choose among the places."""
    what, where, which = edit
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    wide = [n for n in calls if str(n.meta["val"].shape[-1]) == str(WIDTH) and n.users]
    node = wide[where % len(wide)]
    if what == "insert":
        insert_behind(node, _UNARY[which % len(_UNARY)])
    elif what == "bypass":
        silus = program.graph.find_nodes(op="call_function", target=aten.silu.default)
        if silus:
            bypass(silus[where % len(silus)])
    elif what == "constant":
        norms = program.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
        norms[where % len(norms)].update_arg(4, 10.0**-which)
    elif what == "rewire":
        _rewire(wide, where, which)
    else:
        names = [name for name, _ in program.weights()]
        name = names[where % len(names)]
        weight = program.weight(name)
        graphs.set_weight(program.graph_module, name, torch.full_like(weight, float(which)))


def _rewire(wide: list[Node], where: int, which: int) -> None:
    adds = [node for node in wide if node.target is aten.add.Tensor]
    if adds:
        add = adds[where % len(adds)]
        earlier = [n for n in wide[: wide.index(add)] if n.meta["val"].dim() == 3]
        add.update_arg(1, earlier[which % len(earlier)])


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "bypass", "constant", "rewire", "weight"]),
        st.integers(0, 40),
        st.integers(0, 9),
    ),
    max_size=5,
)


def _edited(program: Program, edits: list[Edit]) -> Program:
    copy = program.copy()
    for edit in edits:
        _apply(copy, edit)
    return copy


@settings(max_examples=25, deadline=None)
@given(EDITS, EDITS)
def test_law_mirror(first: list[Edit], second: list[Edit]) -> None:
    before, after = _edited(net(2), first), _edited(net(2), second)
    assert contents(mirror(diff(before, after))) == contents(diff(after, before))


@functools.cache
def identity() -> Program:
    return program_of(nn.Identity(), {"input": torch.ones(2, 3)}, {"input": ("batch", 3)})


def chain(ops: list[int]) -> Program:
    """Unary ops one after the other, at the top level."""
    program = identity().copy()
    node = program.placeholders[0]
    for op in ops:
        node = insert_behind(node, _UNARY[op])
    return program


CHAINS = st.lists(st.integers(0, len(_UNARY) - 1), max_size=8)


@settings(max_examples=60, deadline=None)
@given(CHAINS, CHAINS)
def test_law_chains(first: list[int], second: list[int]) -> None:
    found = diff(chain(first), chain(second))
    assert contents(mirror(found)) == contents(diff(chain(second), chain(first)))
    assert ops_of(found.removed) == Counter(first) - Counter(second)
    assert ops_of(found.added) == Counter(second) - Counter(first)


def test_too_large_to_align(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxgraft.diff_match._MOST_PAIRS", 0)
    found = diff(chain([0, 1, 2, 0]), chain([1, 0, 2]))
    assert ops_of(found.removed) == Counter([0])
    assert not found.added


def ops_of(changes: Iterable[NodeChange]) -> Counter[int]:
    names = [op.name().replace("::", ".") for op in _UNARY]
    return Counter(names.index(change.view.op) for change in changes)


@settings(max_examples=25, deadline=None)
@given(EDITS)
def test_law_identity_and_json(edits: list[Edit]) -> None:
    program = _edited(net(2), edits)
    assert not diff(program, renamed(program))
    found = diff(net(2), program)
    assert GraphDiff.from_json(json.loads(json.dumps(found.to_json()))) == found


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_law_insertions_of_a_new_op_are_all_that_is_added(wheres: list[int]) -> None:
    after = _edited(net(2), [("insert", where, 1) for where in wheres])
    found = diff(net(2), after)
    assert [change.view.op for change in found.added] == ["aten.sin"] * len(wheres)
    assert not found.removed
    assert not found.changed
    assert 0 < len(found.rewired) <= len(wheres) * 3


# Words.


def test_collapse() -> None:
    items = [
        ("a.0.x", 1), ("a.0.y", 2), ("a.1.x", 1), ("a.1.y", 3), ("a.2.x", 1), ("a.2.y", 2),
        ("b.0.e.0", 4), ("b.0.e.1", 4), ("b.1.e.0", 4), ("b.1.e.1", 4), ("c", 5),
    ]  # fmt: skip
    assert collapse(items) == [
        ("a.{0..2}.x", 1), ("a.{0, 2}.y", 2), ("a.1.y", 3), ("b.{0, 1}.e.{0, 1}", 4), ("c", 5),
    ]  # fmt: skip


def test_spans() -> None:
    assert spans(["0", "1", "2", "5", "10", "11"]) == "{0..2, 5, 10, 11}"


@pytest.mark.parametrize(
    ("reference", "module", "expected"),
    [
        ("m.layers.3.mlp:add#2", "m.layers.3.mlp", "add#2"),
        ("m.layers.3.mlp.up.weight", "m.layers.3.mlp.up", "weight"),
        ("m.layers.3.norm:mul", "m.layers.3.mlp.up", "norm.mul"),
        ("m.layers.3:add", "m.layers.3.mlp.up", "add"),
        ("m.layers.2:add", "m.layers.3.mlp.up", "m.layers.{i-1}.add"),
        ("m.layers.4.mlp:add", "m.layers.3", "m.layers.{i+1}.mlp.add"),
        ("m.layers.0.mlp:add", "m.layers.3", "m.layers.0.mlp.add"),
        ("m.layers.3.mlp.experts.0:add", "m.layers.3.mlp.experts.1", "mlp.experts.{i-1}.add"),
        ("m.layers.3:add", "head", "m.layers.3.add"),
        ("m.embed:embedding", "m.layers.3.norm", "m.embed.embedding"),
        (":add", "m.layers.3", "add"),
        ("input_ids", "m.embed", "input_ids"),
    ],
)
def test_shorten(reference: str, module: str, expected: str) -> None:
    assert shorten(reference, module) == expected
