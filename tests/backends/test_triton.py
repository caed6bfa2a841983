"""The Triton backend: the same tokens as the torch backend, alone and in a crowd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.backend import find_backend
from fxgraft.backends.triton import TritonCompiled, TritonOptions
from fxgraft.backends.triton.fuse import fused
from fxgraft.errors import InputError, LoweringError
from fxgraft.generation.options import SamplingOptions
from fxgraft.paging import page_state
from fxgraft.placement import move
from fxgraft.runtime.engine import Engine, EngineOptions
from fxgraft.state import insert_state
from tests import models

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
