"""An optimized ``flow`` model on the GPU backend: as many kernels as the dense one has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from fxgraft import graph as graphs
from fxgraft.backends.triton import TritonCompiled, TritonOptions
from fxgraft.backends.triton.fuse import fused
from fxgraft.kernels.spec import argument
from fxgraft.paging import page_state
from fxgraft.passes.optimize import Optimize
from fxgraft.program import Program
from fxgraft.state import insert_state
from fxgraft.transform import apply
from tests.passes import _flow

LAYERS = {"fxgraft.fused_linear": "layer", "fxgraft.nm_linear": "layer"}
NM: Any = torch.ops.fxgraft.nm_linear.default
NORM: Any = torch.ops.fxgraft.rms_norm.default


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Program]:
    """Optimized: the dense model, and the pruned one."""
    program = _flow.capture()
    data = _flow.write_tokens(tmp_path_factory.mktemp("lowered"))
    pruned = apply(program, _flow.flow(data, criterion="uniform", m=(8,)), check=False)
    dense, small = (apply(p, Optimize(), check=False) for p in (program, pruned))
    return dense, small


def lowered(program: Program) -> GraphModule:
    return fused(page_state(insert_state(program), block_size=4), fresh=False)


def kernels(module: GraphModule) -> Counter[str]:
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    names = [graphs.short_target(node) for node in nodes]
    return Counter(LAYERS.get(name, name) for name in names)


def test_as_many_kernels_as_the_dense_model(programs: tuple[Program, Program]) -> None:
    dense, small = map(lowered, programs)
    assert kernels(small) == kernels(dense)
    # That before the head, where rows are chosen in between.
    assert len(small.graph.find_nodes(op="call_function", target=NORM)) == 1
    nodes = small.graph.find_nodes(op="call_function", target=NM)
    normed = [argument(node, "eps") is not None for node in nodes]
    # Per block: query/key/value, output, gate/up, down.
    assert normed == [True, False, True, False] * 3
    assert all(argument(n, "norm_weight") is not None for n, yes in zip(nodes, normed, strict=True)
               if yes)  # fmt: skip


def test_tokens_are_those_of_the_torch_backend(programs: tuple[Program, Program]) -> None:
    small = programs[1]
    ids = _flow.tokens(2, 5, seed=4)
    compiled = TritonCompiled(small, TritonOptions(device="cpu", cuda_graphs=False))
    found = compiled.generate(ids, max_new_tokens=8, eos_token_id=[])
    expected = ids
    for _ in range(8):
        logits = small(input_ids=expected)[0][:, -1]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, expected)


def test_dense_and_pruned_layers_behind_one_norm(tmp_path: Path) -> None:
    """Both take it in."""
    program = _flow.capture()
    data = _flow.write_tokens(tmp_path)
    mixed = apply(
        program, _flow.flow(data, criterion="uniform", budget=0.25, m=(8,), n=(2, 8),
                            keep_dense=("*k_proj", "*up_proj")), check=False,
    )  # fmt: skip
    module = lowered(apply(mixed, Optimize(), check=False))
    assert len(module.graph.find_nodes(op="call_function", target=NORM)) == 1
    counts = Counter(
        graphs.short_target(node)
        for node in module.graph.nodes
        if node.op == "call_function" and argument_of(node, "eps") is not None
    )
    assert counts == {"fxgraft.fused_linear": 6, "fxgraft.nm_linear": 6}


def argument_of(node: torch.fx.Node, name: str) -> object:
    return argument(node, name) if graphs.short_target(node) in LAYERS else None
