"""Running a Program block by block gives what running it whole gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fxgraft
from fxgraft import blockwise, calibration
from fxgraft.errors import InputError
from tests import models


@pytest.mark.parametrize("build", [models.llama, models.gpt2, models.gemma2, models.jamba])
def test_parts_equal_the_whole(build: Callable[[], nn.Module]) -> None:
    program = fxgraft.capture(build())
    parts = blockwise.parts_of(program)
    assert len(parts) == len(program.layers) + 2
    nodes = [node for part in parts for node in part.nodes]
    assert len(nodes) == len(set(nodes))
    inputs = program.example(seed=2)
    values = [blockwise.start(program, inputs)]
    for part in parts:
        values = blockwise.run_all(part, program, values)
        assert set(values[0]) == part.crossing
    (after,) = values
    assert torch.equal(blockwise.outputs_of(program, after)["logits"], program(**inputs)[0])


def test_weights_are_replaced_and_nodes_watched() -> None:
    program = fxgraft.capture(models.llama())
    name = "model.layers.0.mlp.down_proj.weight"
    (read,) = program.graph.find_nodes(op="get_attr", target=name)
    (linear,) = read.users
    zero = {name: torch.zeros_like(program.weight(name))}
    values = blockwise.start(program, program.example())
    seen: list[torch.Tensor] = []
    for part in blockwise.parts_of(program)[:2]:
        watch: dict[torch.fx.Node, blockwise.Watch] = {linear: lambda args, v: seen.append(v)}
        values = blockwise.run(part, program, values, weights=zero, watch=watch)
    assert len(seen) == 1
    assert bool((seen[0] == 0).all())


def test_sequences_are_cut_at_random_and_again_alike() -> None:
    tokens = torch.arange(100)
    one, two = (calibration.from_tokens(tokens, calibration.Choice(6, 10, seed)) for seed in (0, 0))
    rows = torch.cat([batch["input_ids"] for batch in one])
    assert torch.equal(rows, torch.cat([batch["input_ids"] for batch in two]))
    assert rows.shape == (6, 10)
    assert bool((rows.diff(dim=1) == 1).all())
    assert len(set(rows[:, 0].tolist())) > 1
    with pytest.raises(InputError, match="has 100 tokens, one sequence needs 101"):
        calibration.from_tokens(tokens, calibration.Choice(1, 101))


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "1+1?", "answer": "2", "id": 7}\n\n{"text": "x", "more": "y"}\n')
    assert calibration.read_text(path) == "1+1?\n\n2\n\nx"
    path.write_text("[1]\n")
    with pytest.raises(InputError, match="line 1 holds no object"):
        calibration.read_text(path)
    path.write_text("{\n")
    with pytest.raises(InputError, match="line 1"):
        calibration.read_text(path)
