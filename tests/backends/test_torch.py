"""The torch backend: the decode graph that is compiled computes what the step graph does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxgraft
from fxgraft import graph as graphs
from fxgraft.backends.torch import backend as torch_backend
from fxgraft.backends.torch.decompose import decompose
from fxgraft.backends.torch.regions import RegionRunner
from fxgraft.errors import InputError, LoweringError
from fxgraft.passes.optimize import Optimize
from fxgraft.program import Program
from fxgraft.specialise import specialise
from fxgraft.state import insert_state
from fxgraft.transform import apply
from tests import models

PROMPT = 9
FAMILIES = [models.llama, models.mistral, models.gemma2, models.gpt2, models.mamba]


def decode_graph(program: Program, batch: int) -> GraphModule:
    module = specialise(insert_state(program), {"batch": batch, "sequence": 1}).graph_module
    decompose(module)
    graphs.finish(module)
    return module


def one_step(
    program: Program, batch: int, run: Callable[[Sequence[Tensor]], Sequence[Tensor]]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Outputs of the step graph and of ``run`` for one token after a prompt."""
    step = insert_state(program)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, models.VOCABULARY, (batch, PROMPT + 1), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    values = {"input_ids": ids, "attention_mask": mask,
              "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}  # fmt: skip

    def inputs(start: int, end: int, state: Sequence[Tensor]) -> list[Tensor]:
        new = {name: value[:, start:end] for name, value in values.items()}
        new["attention_mask"] = mask[:, :end]
        return [*(new[spec.name] for spec in step.own_inputs), *state]

    with torch.no_grad():
        prefill = step.program.graph_module(*inputs(0, PROMPT, step.empty_state(batch)))
        last = inputs(PROMPT, PROMPT + 1, prefill[1:])
        return step.program.graph_module(*last), run(last)


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_decode_graph_equals_the_step_graph(
    build: Callable[[], nn.Module], optimized: bool, batch: int
) -> None:
    program = fxgraft.capture(build())
    if optimized:
        program = apply(program, Optimize(), check=False)
    module = decode_graph(program, batch)
    runner = RegionRunner(module, lambda region: region)
    wanted, got = one_step(program, batch, runner)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_equal_layers_share_one_region() -> None:
    program = apply(fxgraft.capture(models.llama(num_hidden_layers=6)), Optimize(), check=False)
    runner = RegionRunner(decode_graph(program, 1), lambda region: region)
    assert len(runner.regions) >= 6
    assert runner.distinct <= 4


@pytest.mark.slow
@pytest.mark.parametrize("optimized", [False, True])
def test_inductor_generates_the_same_tokens(optimized: bool) -> None:
    problem = torch_backend.inductor_problem()
    if problem:
        pytest.skip(problem)
    program = fxgraft.capture(models.llama())
    if optimized:
        program = apply(program, Optimize(), check=False)
    prompt = program.example(batch=2, sequence=PROMPT)["input_ids"]
    tokens = [
        fxgraft.compile(program, backend="torch", options={"mode": mode}).generate(
            prompt, max_new_tokens=12, eos_token_id=[], pad_token_id=0
        )
        for mode in ("eager", "inductor")
    ]
    assert torch.equal(*tokens)


def test_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    program = fxgraft.capture(models.gpt2())
    wrong: list[dict[str, Any]] = [{"mode": "fast"}, {"speed": 1}]
    for options in wrong:
        with pytest.raises(InputError, match="mode"):
            fxgraft.compile(program, backend="torch", options=options)
    monkeypatch.setattr(torch_backend, "inductor_problem", lambda: "no C++ compiler is installed")
    with pytest.raises(LoweringError, match="compiler"):
        fxgraft.compile(program, backend="torch", options={"mode": "inductor"})
    assert "compiler" in str(fxgraft.compile(program, backend="torch").report())
