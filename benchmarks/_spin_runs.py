"""Decode steps and prompts of a Llama whose heads ``spin`` suppresses, as the engine runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch

import fxgraft
from fxgraft.backends.triton import TritonCompiled, TritonOptions
from fxgraft.paged_model import Rows
from fxgraft.passes.spin import Spin
from fxgraft.runtime.engine import Engine, EngineOptions


@dataclass(frozen=True)
class Shape:
    """A Llama and where the image lies in its prompts.

    Attributes:
        span: first position of the image, and the one behind its last.
        prompt: tokens of a prompt.
    """

    layers: int = 32
    width: int = 4096
    heads: int = 32
    inner: int = 11008
    vocabulary: int = 32000
    span: tuple[int, int] = (35, 611)
    prompt: int = 641
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    def model(self) -> Any:
        """It, with random weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads,
            max_position_embeddings=8192, eos_token_id=None, bos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        torch.set_default_dtype(self.dtype)
        torch.manual_seed(0)
        with torch.device(self.device):
            model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        return cast(Any, model).eval()

    def variants(self) -> dict[str, list[Spin]]:
        """The passes that each variant applies."""
        span = self.span
        return {
            "plain": [],
            "keep 0.95, factor 0.08": [Spin(span=span, keep=0.95, factor=0.08)],
            "keep 0.7, factor 0": [Spin(span=span, keep=0.7)],
            "mass, keep 0.95, factor 0.08": [Spin(span=span, keep=0.95, factor=0.08, score="mass")],
        }


TINY = Shape(2, 64, 4, 96, 128, (3, 11), 19, "cpu", torch.float32)


def compiled_of(shape: Shape, program: fxgraft.Program, steps: list[Spin]) -> TritonCompiled:
    """The Triton backend; on a CPU it runs the same graphs by each op's general implementation."""
    changed = fxgraft.compile(program, steps, backend="torch", check=False).program
    is_gpu = shape.device == "cuda"
    return TritonCompiled(changed, TritonOptions(device=shape.device, cuda_graphs=is_gpu))


def engine_of(shape: Shape, compiled: TritonCompiled, batch: int, context: int) -> Engine:
    """An engine with room for so many requests of ``context`` tokens and a few more."""
    longest = context + 64
    token_bytes = 2 * shape.layers * shape.width * shape.dtype.itemsize
    sums = 4 * shape.layers * shape.width * (batch + 2)
    options = EngineOptions(
        max_batch=batch, max_context=longest, snapshots=0,
        memory_bytes=int(1.05 * batch * (longest + 32) * token_bytes) + sums + 2**20,
    )  # fmt: skip
    return Engine(compiled, options)


def fill(engine: Engine, batch: int, context: int) -> None:
    """Blocks in random order for every row, and random states: keys, their sums, what is chosen."""
    held = engine.batch
    pages = -(-(context + 64) // engine.options.block_size)
    for group, table in zip(engine.model.paged.groups, held.tables, strict=True):
        count = len(group.layers) * batch * pages
        blocks = torch.randperm(count, device=table.device) + 1
        table[:, :, :pages] = blocks.view(len(group.layers), batch, pages).int()
    held.slots.copy_(torch.arange(1, batch + 1, device=held.slots.device))
    for pool in chain(*engine.model.block_pools, engine.model.slot_pools):
        if pool.dtype == torch.bool:
            pool.fill_(True)
        else:
            pool.normal_()


def step_of(engine: Engine, batch: int, context: int) -> Callable[[], object]:
    """The captured step over all rows, each with ``context`` tokens before it."""
    fill(engine, batch, context)
    run = engine.batch.prepare(batch)

    def step() -> None:
        engine.batch.past.fill_(context)
        run()

    return step


def prompt_of(engine: Engine, shape: Shape, batch: int) -> Callable[[], torch.Tensor]:
    """A call that takes in whole prompts of ``batch`` requests."""
    fill(engine, batch, shape.prompt)
    held = engine.batch
    rows = Rows(
        torch.randint(3, shape.vocabulary, (batch, shape.prompt), device=shape.device),
        torch.zeros(batch, dtype=torch.int32, device=shape.device),
        held.slots[:batch],
        [table[:, :batch].contiguous() for table in held.tables],
        0,
        {name: value[:batch] for name, value in held.inputs.items()},
    )
    return lambda: engine.model(rows)
