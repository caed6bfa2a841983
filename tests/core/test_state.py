"""Step graphs: prefill, chunks and single tokens give what the whole sequence gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fxgraft import graph as graphs
from fxgraft.errors import StateError
from fxgraft.frontends.capture import capture
from fxgraft.kernels.spec import dims
from fxgraft.program import Program
from fxgraft.state import StepProgram, insert_state
from tests import models

FAMILIES = [models.llama, models.mistral, models.gemma2, models.gpt2, models.opt, models.mamba,
            models.jamba]  # fmt: skip
LENGTH = 19


def inputs_of(program: Program, batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, models.VOCABULARY, (batch, LENGTH), generator=generator)
    mask = torch.ones(batch, LENGTH, dtype=torch.int64)
    mask[0, :4] = 0
    values = {"input_ids": ids, "attention_mask": mask}
    if any(spec.name == "position_ids" for spec in program.inputs):
        values["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return values


def run_steps(
    step: StepProgram, values: dict[str, torch.Tensor], cuts: list[int]
) -> list[torch.Tensor]:
    state = step.empty_state(values["input_ids"].shape[0])
    outputs: list[torch.Tensor] = []
    start = 0
    for end in cuts:
        new = {name: value[:, start:end] for name, value in values.items()}
        new["attention_mask"] = values["attention_mask"][:, :end]
        with torch.no_grad():
            result = step.program.graph_module(*[new[s.name] for s in step.own_inputs], *state)
        outputs.append(result[0][:, -1])
        state = list(result[1:])
        start = end
    return outputs


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
@pytest.mark.parametrize("cuts", [[7, 8, 12, *range(13, LENGTH + 1)], [1, 2, 3, 17, LENGTH]])
def test_steps_equal_the_whole(build: Callable[[], nn.Module], cuts: list[int]) -> None:
    model = build()
    program = capture(model)
    values = inputs_of(program, batch=3)
    with torch.no_grad():
        whole = model(**values, use_cache=False).logits
    outputs = run_steps(insert_state(program), values, cuts)
    for end, logits in zip(cuts, outputs, strict=True):
        seen = values["attention_mask"][:, end - 1].bool()
        torch.testing.assert_close(logits[seen], whole[seen, end - 1], atol=2e-5, rtol=1e-4)


def test_window_bounds_the_state() -> None:
    step = insert_state(capture(models.mistral()))
    values = inputs_of(step.program, batch=2)
    state = step.empty_state(2)
    with torch.no_grad():
        result = step.program.graph_module(*[values[s.name] for s in step.own_inputs], *state)
    assert all(entry.limit == 5 for entry in step.states)
    assert all(tensor.shape[2] == 5 for tensor in result[1:])


def test_values_are_symbolic_and_true() -> None:
    step = insert_state(capture(models.llama()))
    symbols = step.program.symbols
    shape = dims(step.program.output_nodes["present_0_key"])
    assert shape[0] == symbols["batch"]
    assert shape[2] == symbols["past"] + symbols["sequence"]
    before = {
        node.name: graphs.signature(node.meta.get("val")) for node in step.program.graph.nodes
    }
    graphs.propagate(step.program.graph_module)
    after = {node.name: graphs.signature(node.meta.get("val")) for node in step.program.graph.nodes}
    assert before == after


def test_logits_of_the_last_position_only() -> None:
    step = insert_state(capture(models.llama()))
    assert dims(step.program.output_nodes["logits"])[1] == 1
    head = [n for n in step.program.graph.nodes if n.meta.get("module") == "lm_head"]
    linear = next(n for n in head if n.op == "call_function" and "linear" in str(n.target))
    assert dims(linear)[1] == 1


def test_the_program_is_not_changed() -> None:
    program = capture(models.llama())
    code = program.graph_module.code
    insert_state(program)
    assert program.graph_module.code == code


def test_bidirectional_attention_is_refused() -> None:
    program = capture(models.llama())
    for node in program.graph.find_nodes(
        op="call_function", target=torch.ops.fxgraft.attention.default
    ):
        node.update_kwarg("is_causal", False)
    with pytest.raises(StateError, match=r"layers\.0\.self_attn"):
        insert_state(program)
