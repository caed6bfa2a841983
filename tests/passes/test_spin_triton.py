"""``spin`` on the Triton backend: the torch backend's tokens, and no node more than without it."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxgraft
from fxgraft.backends.triton import TritonCompiled, TritonOptions, backend
from fxgraft.backends.triton.fuse import fused
from fxgraft.generation import SamplingOptions
from fxgraft.paging import PagedProgram, page_state
from fxgraft.passes.spin import Spin
from fxgraft.placement import move
from fxgraft.program import Program
from fxgraft.runtime.engine import Engine, EngineOptions
from fxgraft.state import insert_state
from tests import models
from tests.kernels._interpreter import INTERPRETED, RUNS_KERNELS, prepare, run_interpreted
from tests.passes import _vision_models

fx = torch.ops.fxgraft
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    ],
)
SPAN = (2, 9)
STEPS = {
    "soft": Spin(span=SPAN, heads=2, factor=0.1),
    "hard": Spin(span=SPAN, heads=1),
    "text": Spin(span=SPAN, heads=2, factor=0.3, rows="all_text"),
    "mass": Spin(span=SPAN, heads=2, factor=0.1, score="mass"),
    "mass of text": Spin(span=SPAN, heads=1, score="mass", rows="all_text"),
}
# The third prompt ends inside the image.
LENGTHS = (17, 11, 5)
NEW = 8


def program_of(model: nn.Module, *steps: Spin) -> Program:
    program = fxgraft.capture(model)
    return fxgraft.compile(program, ["optimize", *steps], backend="torch", check=False).program


def triton_of(program: Program, device: str = "cpu") -> TritonCompiled:
    """On a CPU the same graphs run by each op's general implementation."""
    moved = program.copy()
    move(moved, device)
    return TritonCompiled(moved, TritonOptions(device=device, cuda_graphs=device == "cuda"))


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(3, models.VOCABULARY, (length,), generator=generator).tolist()
        for length in lengths
    ]


def answers(compiled: Any, rows: list[list[int]]) -> list[list[int]]:
    result: Tensor = compiled.generate(rows, max_new_tokens=NEW, eos_token_id=[], pad_token_id=0)
    return result[:, -NEW:].tolist()


def torch_answers(program: Program, rows: list[list[int]]) -> list[list[int]]:
    compiled = fxgraft.compile(program, backend="torch", options={"mode": "eager"}, check=False)
    return [answers(compiled, [row])[0] for row in rows]


def llama() -> nn.Module:
    """Grouped queries."""
    return models.llama(num_hidden_layers=2)


def phi() -> nn.Module:
    """A kv head for each query head; half of it rotates."""
    return models.phi(num_hidden_layers=2)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(
    ("build", "name"), [*((llama, name) for name in STEPS), (phi, "hard"), (phi, "mass")]
)
def test_tokens_are_those_of_the_torch_backend(
    build: Callable[[], nn.Module], name: str, device: str
) -> None:
    """Rows of three lengths; one ends before the image does."""
    program = program_of(build(), STEPS[name])
    compiled = triton_of(program, device)
    rows = prompts(*LENGTHS)
    found = answers(compiled, rows)
    assert compiled.state_problem is None
    assert found == torch_answers(program, rows)
    assert found != torch_answers(program_of(build()), rows)


def paged_of(program: Program) -> PagedProgram:
    return page_state(insert_state(program), block_size=4)


@pytest.mark.parametrize("name", STEPS)
def test_no_node_is_added_to_a_layer(name: str) -> None:
    """Score and gate are part of attention, which still turns its queries and keys."""
    plain, gated = (kernels_of(program_of(llama(), *steps)) for steps in ([], [STEPS[name]]))
    assert gated == plain
    assert gated[fx.paged_attention.default] == 2


def kernels_of(program: Program) -> Counter[Any]:
    graph = fused(paged_of(program), fresh=False).graph
    names = (node.target for node in graph.nodes if node.op == "call_function")
    return Counter(target for target in names if str(target).startswith("fxgraft"))


def test_a_score_that_others_read_stays() -> None:
    """A control's fixed order is no score that attention could compute."""
    counts = kernels_of(program_of(llama(), Spin(span=SPAN, heads=2, score="random")))
    assert counts[fx.head_gate.default] == counts[fx.paged_attention.default] == 2


@pytest.mark.parametrize("name", STEPS)
def test_steps_need_no_mask_and_no_more_memory(name: str) -> None:
    """So they can be captured. Of a key's state no op has a copy of its own."""
    plain, paged = (paged_of(program_of(llama(), *steps)) for steps in ([], [STEPS[name]]))
    assert not paged.needs_mask
    [group], [before] = paged.groups, plain.groups
    assert len(group.layers) == len(before.layers)
    by_mass = STEPS[name].score == "mass"
    assert group.block_bytes - before.block_bytes == (4 if by_mass else 0)
    sums = [pool.item_bytes for pool in paged.slot_pools]
    assert sums == ([] if by_mass else [2 * 16 * 4] * 2)


@pytest.mark.parametrize("name", ["hard", "mass"])
def test_one_captured_step_serves_any_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(llama(), STEPS[name])
    compiled = triton_of(program)
    captured: list[Any] = []

    def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        captured.append(step)
        return step

    monkeypatch.setattr(compiled, "capture_step", capture)
    for length in LENGTHS:
        row = prompts(length)
        assert answers(compiled, row) == torch_answers(program, row)
    assert len(captured) == 1


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("name", ["soft", "hard", "mass"])
def test_engine_with_chunks_and_shared_prefixes(name: str, device: str) -> None:
    """Chunks end inside the image; later requests begin with the first one's blocks."""
    program = program_of(llama(), STEPS[name])
    options = EngineOptions(
        block_size=4, chunk_tokens=6, max_batch=3, max_context=64, memory_bytes=2**24
    )
    engine = Engine(triton_of(program, device), options)
    engine.warm_up()
    [long, *others] = prompts(17, 11, 1)
    rows = [long, *others, long[:14], long]
    sampling = SamplingOptions(max_new_tokens=NEW, eos_token_id=())
    requests = [engine.submit(row, sampling) for row in rows]
    while engine.step():
        pass
    assert [request.tokens for request in requests] == torch_answers(program, rows)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("score", ["logit_sum", "mass"])
def test_prompts_with_images(score: Any, device: str) -> None:
    """The image's place is found in each prompt; the last one has no image."""
    case = _vision_models.llava()
    step = Spin(heads=1, factor=0.1, score=score)
    program = fxgraft.compile(case.program(), [step], backend="torch", check=False).program
    given = case.inputs(["ttItttttt", "tItttt", "ttt"])
    call: dict[str, Any] = {
        "images": case.images, "max_new_tokens": NEW, "eos_token_id": [], "pad_token_id": 0,
    }  # fmt: skip
    text = (given["input_ids"], given["attention_mask"])
    plain = fxgraft.compile(program, backend="torch", options={"mode": "eager"}, check=False)
    expected = plain.generate(*text, **call)
    assert triton_of(program, device).generate(*text, **call).tolist() == expected.tolist()


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the tests above run kernels")
@pytest.mark.parametrize("name", STEPS)
def test_tokens_by_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels in the interpreter, from the prompt on."""
    prepare()
    kernels = importlib.import_module("fxgraft.kernels.paged_attention.triton")

    def by_kernels(paged: PagedProgram, *, fresh: bool) -> GraphModule:
        module = fused(paged, fresh=fresh)
        for node in module.graph.find_nodes(op="call_function", target=fx.paged_attention.default):
            node.target = kernels.paged_attention
        module.recompile()
        return module

    monkeypatch.setattr(backend, "fused", by_kernels)
    program = program_of(llama(), STEPS[name])
    rows = prompts(12, 5)
    assert answers(triton_of(program), rows) == torch_answers(program, rows)


@pytest.mark.slow
@pytest.mark.skipif(RUNS_KERNELS, reason="it runs in this process")
def test_kernels_in_the_interpreter() -> None:
    summary = run_interpreted(f"{__file__}::test_tokens_by_kernels")
    assert summary.startswith(f"{len(STEPS)} passed")
