"""What the numeric check compares, on which inputs; and facts of small Programs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxgraft import check, facts, interpreter
from fxgraft.errors import GraphError
from fxgraft.frontends.exporting import export
from fxgraft.program import Input, Program, Range
from fxgraft.state import insert_state
from tests.core.small_passes import calls


class Attentive(nn.Module):
    """One attention layer with learned positions, at most ``positions`` of them."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.position = nn.Embedding(positions, 8)
        self.head = nn.Linear(8, 9)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        positions = torch.arange(input_ids.shape[1])
        x = (self.embed(input_ids) + self.position(positions)).unsqueeze(1)
        mixed = torch.ops.fxgraft.attention(x, x, x, scale=0.5)
        return {"logits": self.head(mixed.squeeze(1))}


def attentive(positions: int) -> Program:
    inputs = (Input("input_ids", torch.int64, ("batch", "sequence"), high=9),)
    return export(Attentive(positions), inputs, {"input_ids": torch.zeros(2, 5, dtype=torch.int64)})


def compare(before: Program, after: Program) -> check.Comparison:
    return check.compare(check.Reference.of(before, after), after)


@pytest.fixture(scope="module")
def program() -> Program:
    return attentive(16)


def test_two_sizes_are_tried(program: Program) -> None:
    found = compare(program, program.copy())
    assert [trial.sizes for trial in found.trials] == [
        {"batch": 2, "sequence": 13},
        {"batch": 3, "sequence": 7},
    ]
    assert found.error == 0


def test_sizes_stay_in_their_ranges(program: Program) -> None:
    bounded = program.copy()
    bounded.dimensions = {"batch": Range(4, 9), "sequence": Range(1, 6), "other": Range()}
    assert check.check_sizes(bounded) == {"batch": 4, "sequence": 6, "other": 5}
    assert check.check_sizes(bounded, 1) == {"batch": 4, "sequence": 6, "other": 6}


def test_a_size_that_the_original_cannot_take_is_left_out() -> None:
    short = attentive(8)
    assert [t.sizes["sequence"] for t in compare(short, short.copy()).trials] == [7]


def test_an_original_that_runs_at_no_size_is_an_error() -> None:
    shortest = attentive(6)
    with pytest.raises(GraphError, match=r"node 'embedding_1' .* in module 'position' .*fails"):
        compare(shortest, shortest.copy())


def test_a_rewrite_that_fails_where_the_original_runs_is_an_error(program: Program) -> None:
    shorter = program.copy()
    shorter.set_weight("position.weight", torch.zeros(8, 8))
    with pytest.raises(GraphError, match="fails when it is run"):
        compare(program, shorter)


def test_values_are_kept_by_node_name(program: Program) -> None:
    kept: dict[str, object] = {}
    outputs = interpreter.run(program, program.example(), kept=kept)
    (node,) = calls(program, torch.ops.fxgraft.attention.default)
    assert isinstance(kept[node.name], torch.Tensor)
    assert kept[program.output_nodes["logits"].name] is outputs["logits"]


def test_metadata_is_held_against_values_of_any_size(program: Program) -> None:
    lying = program.copy()
    (node,) = calls(lying, torch.ops.fxgraft.attention.default)
    node.meta["val"] = node.meta["val"].to(torch.float16)
    interpreter.run(lying, lying.example())
    with pytest.raises(GraphError, match=r"gives float32 \[2, 1, 13, 8\], .* says float16 \[s"):
        interpreter.run(lying, lying.example(), verify=True)


def test_attention_and_state_are_facts(program: Program) -> None:
    assert facts.facts(program) >= {"has_attention", "stateless", "causal_lm"}
    assert "has_recurrence" not in facts.facts(program)
    stepping = facts.facts(insert_state(program).program)
    assert "stateless" not in stepping
    assert "has_attention" in stepping


def test_images_are_a_fact(program: Program) -> None:
    assert "has_images" not in facts.facts(program)
    vision = program.copy()
    vision.inputs = (Input("x", torch.float32, ("batch", 3, 32, 32)),)
    assert "has_images" in facts.facts(vision)
