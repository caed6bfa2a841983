"""The Triton backend: the same tokens as the torch backend, alone and in a crowd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.backend import find_backend
from fxgraft.backends.triton import TritonCompiled, TritonOptions, step_model
from fxgraft.backends.triton.fuse import fused
from fxgraft.errors import Error, InputError, LoweringError
from fxgraft.generation.options import SamplingOptions
from fxgraft.paging import page_state
from fxgraft.placement import move
from fxgraft.runtime.engine import Engine, EngineOptions
from fxgraft.state import insert_state
from tests import models
from tests.passes import _vision_models

FAMILIES = [models.llama, models.mistral, models.gemma2, models.gpt2, models.mamba, models.jamba]
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    ],
)
NEW = 12


def compiled_on(model: nn.Module, device: str) -> TritonCompiled:
    """The same graphs and fusions run on a CPU, by each op's general implementation."""
    program = fxgraft.compile(model, ["optimize"], backend="torch").program.copy()
    move(program, device)
    return TritonCompiled(program, TritonOptions(device=device, cuda_graphs=device == "cuda"))


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(3, models.VOCABULARY, (length,), generator=generator).tolist()
        for length in lengths
    ]


def alone(model: nn.Module, prompt: list[int]) -> list[int]:
    """What the torch backend answers."""
    result = fxgraft.compile(model, backend="torch").generate(
        [prompt], max_new_tokens=NEW, eos_token_id=[]
    )
    return result[0, len(prompt) :].tolist()


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_tokens_are_those_of_the_torch_backend(build: Callable[[], nn.Module], device: str) -> None:
    model = build()
    compiled = compiled_on(model, device)
    rows = prompts(9, 4, 6)
    expected = [alone(model, row) for row in rows]
    result: Tensor = compiled.generate(rows, max_new_tokens=NEW, eos_token_id=[], pad_token_id=0)
    assert compiled.state_problem is None
    assert result[:, -NEW:].tolist() == expected
    # Longer than the first pools, twice, and with steps that were captured before.
    again = compiled.generate(rows[:1], max_new_tokens=NEW, eos_token_id=[])
    assert again[0, -NEW:].tolist() == expected[0]


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("build", [models.llama, models.jamba], ids=lambda build: build.__name__)
def test_rows_that_end_early_leave_the_others_alone(
    build: Callable[[], nn.Module], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are launched before it is known which rows have ended, and pools grow meanwhile."""
    monkeypatch.setattr(step_model, "_FIRST_CAPACITY", 16)
    model = build()
    rows = prompts(9, 4, 6, 5)
    expected = [alone(model, row) for row in rows]
    # One token of each of three rows ends it; the fourth goes on if it has none of them.
    eos = [expected[0][1], expected[1][4], expected[2][4]]
    kept = [cut(answer, eos) for answer in expected]
    output = compiled_on(model, device).generate(
        rows, max_new_tokens=NEW, eos_token_id=eos, return_dict=True
    )
    assert [row.tolist() for row in output.new_tokens] == kept
    assert len({len(answer) for answer in kept}) > 1
    ended = ["eos" if answer[-1] in eos else "length" for answer in kept]
    assert list(output.finish_reasons) == ended


def cut(answer: list[int], eos: list[int]) -> list[int]:
    """An answer up to its first ending token."""
    end = next((i for i, token in enumerate(answer) if token in eos), len(answer) - 1)
    return answer[: end + 1]


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_prompts_with_images_are_continued_alike(device: str) -> None:
    case = _vision_models.llava()
    program = case.program()
    given = case.inputs(["ttItttttt", "tItttt"])
    call: dict[str, Any] = {
        "images": case.images, "max_new_tokens": NEW, "eos_token_id": [], "pad_token_id": 0,
    }  # fmt: skip
    text = (given["input_ids"], given["attention_mask"])
    expected = fxgraft.compile(program, backend="torch").generate(*text, **call)
    moved = program.copy()
    move(moved, device)
    compiled = TritonCompiled(moved, TritonOptions(device=device, cuda_graphs=device == "cuda"))
    assert compiled.generate(*text, **call).tolist() == expected.tolist()


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_logits_that_are_not_finite_are_an_error(device: str) -> None:
    model = models.llama()
    compiled = compiled_on(model, device)
    weight = compiled.program.weight("model.norm.weight")
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(Error, match=r"row 0 are not finite at generation step 0"):
        compiled.generate(prompts(5), max_new_tokens=3)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_steps_follow_each_other_only_where_nobody_looks(device: str) -> None:
    """A callback sees each token before the next step, so nothing is launched ahead."""
    compiled = compiled_on(models.llama(), device)
    rows = prompts(7, 3)
    seen: list[list[int]] = []

    def look(tokens: Tensor, ended: Tensor) -> bool:
        seen.append(tokens.tolist())
        return len(seen) == 4

    watched = compiled.generate(rows, max_new_tokens=NEW, eos_token_id=[], on_token=look)
    free = compiled.generate(rows, max_new_tokens=NEW, eos_token_id=[])
    assert torch.tensor(seen).T.tolist() == watched[:, -4:].tolist() == free[:, 7:11].tolist()


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("build", [models.llama, models.jamba], ids=lambda build: build.__name__)
def test_engine_answers_as_alone(build: Callable[[], nn.Module], device: str) -> None:
    model = build()
    options = EngineOptions(max_batch=3, max_context=64, memory_bytes=2**24, chunk_tokens=7)
    engine = Engine(compiled_on(model, device), options)
    engine.warm_up()
    rows = prompts(9, 17, 3, 9, 1)
    sampling = SamplingOptions(max_new_tokens=NEW, eos_token_id=())
    requests = [engine.submit(row, sampling) for row in rows]
    while engine.step():
        pass
    for row, request in zip(rows, requests, strict=True):
        assert request.tokens == alone(model, row)


def test_fusions_of_a_llama() -> None:
    """Norm, gate and residual go into the linear layers, rotary into attention."""
    program = fxgraft.compile(models.llama(), ["optimize"], backend="torch").program
    paged = page_state(insert_state(program), block_size=4)
    nodes: list[Any] = list(fused(paged, fresh=False).graph.nodes)
    fx = torch.ops.fxgraft
    layers = 3
    counts = {
        op: sum(node.target is op for node in nodes)
        for op in (
            fx.fused_linear.default, fx.paged_attention.default, fx.rms_norm.default,
            fx.rotary.default, fx.gated_activation.default, torch.ops.aten.linear.default,
        )
    }  # fmt: skip
    # The last norm stands before the row that is asked for is selected.
    assert list(counts.values()) == [4 * layers + 1, layers, 1, 0, 0, 0]
    fresh = [node for node in fused(paged, fresh=True).graph.nodes if "longest_past" in node.kwargs]
    assert [node.kwargs["longest_past"] for node in fresh] == [0] * layers


def test_row_buckets_hold_their_rows() -> None:
    compiled = compiled_on(models.llama(), "cpu")
    buckets = [compiled.row_bucket(rows) for rows in range(1, 130)]
    assert all(bucket >= rows for rows, bucket in enumerate(buckets, start=1))
    assert sorted(set(buckets))[:6] == [1, 2, 4, 8, 16, 24]
    assert buckets == sorted(buckets)


def test_unknown_option_is_named() -> None:
    with pytest.raises(InputError, match="'blocks'"):
        find_backend("triton").check_options({"blocks": 4})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(LoweringError, match="no CUDA device"):
        fxgraft.compile(models.llama(), backend="triton")
