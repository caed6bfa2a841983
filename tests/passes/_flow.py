"""Models and data for the tests of ``flow``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fxgraft
from fxgraft.calibration import Inputs
from fxgraft.offline import Workspace
from fxgraft.passes.flow import Flow, FlowCalibration
from fxgraft.passes.flow.patterns import Pattern
from fxgraft.passes.flow.scores import group_mask
from fxgraft.passes.flow.settings import FlowSettings
from fxgraft.passes.flow.study import Study
from fxgraft.program import Program
from tests import models


def tokens(samples: int = 8, length: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, models.VOCABULARY, (samples, length), generator=generator)


def write_tokens(folder: Path, samples: int = 8, length: int = 16) -> Path:
    path = folder / "tokens.safetensors"
    save_file({"input_ids": tokens(samples, length)}, path)
    return path


def settings(path: Path | None = None, **changes: Any) -> dict[str, Any]:
    data = {"data": (path,)} if path is not None else {}
    return {"samples": 8, "probes": 1, **data, **changes}


def study(program: Program, batches: list[Inputs] | None = None, **changes: Any) -> Study:
    inputs = batches or [{"input_ids": rows} for rows in tokens().split(4)]
    return Study.of(program, FlowSettings(**settings(**changes)), Workspace(), inputs)


def llama(**changes: Any) -> nn.Module:
    """A Llama whose layers are not all alike, so that there is something to choose."""
    model = models.llama(num_hidden_layers=3, **changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "layers" in name:
                shape = (weight.shape[0], weight.shape[1])
                weight.mul_(torch.rand(shape, generator=generator).pow(2) * 4)
    return model


def capture(build: Callable[[], nn.Module] = llama) -> Program:
    return fxgraft.capture(build())


def calibrate(program: Program, folder: Path, **changes: Any) -> Path:
    data = write_tokens(folder)
    stage = FlowCalibration.from_config(settings(data, **changes))
    stage.calibrate(program, folder / "masks")
    return folder / "masks"


def flow(path: Path, **changes: Any) -> Flow:
    return Flow(**settings(path, **changes))


def sparse_inputs(folder: Path) -> Flow:
    """4:8 for what reads the first norm: those masks do not depend on what other passes do."""
    return Flow(
        data=(write_tokens(folder),), samples=8, probes=1, criterion="uniform", budget=0.01,
        m=(8,), n=(4,), keep_dense=("1", "*mlp*", "*o_proj"),
    )  # fmt: skip


@contextlib.contextmanager
def inputs_pruned(model: nn.Module, folder: Path) -> Generator[None]:
    """Does the same to the original, a Llama."""
    inner = cast(Any, model).model
    block = inner.layers[0]
    with torch.no_grad():
        x = block.input_layernorm(inner.embed_tokens(tokens()))
    norms = x.square().sum(1).mean(0).sqrt()
    layers = [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
    saved = [layer.weight.data for layer in layers]
    for layer in layers:
        kept = group_mask(layer.weight.data.abs() * norms, Pattern(4, 8))
        layer.weight.data = torch.where(kept, layer.weight.data, 0)
    try:
        yield
    finally:
        for layer, weight in zip(layers, saved, strict=True):
            layer.weight.data = weight
