"""N:M sparse weights through the passes that cut and join weights, and through saving."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from fxgraft import interpreter
from fxgraft.errors import ContractError
from fxgraft.frontends.capture import capture
from fxgraft.kernels.nm_linear.op import SPEC
from fxgraft.kernels.nm_linear.packing import unpack
from fxgraft.kernels.spec import argument
from fxgraft.packed_weights import pack_weights, unpack_weights
from fxgraft.passes.optimize import Optimize
from fxgraft.passes.prune_heads import PruneHeads
from fxgraft.program import Program
from fxgraft.transform import apply
from tests import models
from tests.kernels._nm import packed, prune
from tests.passes._ranks import run_shares, shares_of

PATTERNS = {
    "q_proj": (2, 4), "k_proj": (2, 4), "v_proj": (1, 4), "o_proj": (4, 8),
    "gate_proj": (2, 8), "up_proj": (2, 8), "down_proj": (8, 16),
}  # fmt: skip
VALUES = {
    "input_ids": torch.tensor([[5, 9, 17, 3, 8], [4, 11, 2, 7, 60]]),
    "attention_mask": torch.ones(2, 5, dtype=torch.int64),
}


@cache
def sparse() -> tuple[Program, Program]:
    """A Qwen 2, whose projections have biases: zeros in dense tensors, and the same packed."""
    pruned = prune(capture(models.qwen2(num_hidden_layers=1)), PATTERNS)
    return pruned, packed(pruned, PATTERNS)


LEAVES = ("values", "indices")


def dense_of(program: Program, layer: str) -> Tensor:
    """The weight of a packed 2:4 layer of the attention."""
    values, indices = (program.weight(f"model.layers.0.self_attn.{layer}.{p}") for p in LEAVES)
    return unpack(values, indices, 2, 4)


def logits(program: Program) -> Tensor:
    return interpreter.run(program, VALUES)["logits"]


def sparse_layers(program: Program) -> dict[str, str]:
    """N:M by name of the packed weight, without what all names begin with."""
    return {
        str(cast(Node, node.args[1]).target).split(".", 4)[-1]: (
            f"{argument(node, 'n')}:{argument(node, 'm')}"
        )
        for node in program.graph.find_nodes(op="call_function", target=SPEC.overload)
    }


def test_packing_changes_no_result_and_the_way_back_is_exact() -> None:
    dense, small = sparse()
    torch.testing.assert_close(logits(small), logits(dense))
    back = small.copy()
    patterns = unpack_weights(back)
    weights = dict(back.weights())
    for name, weight in dense.weights():
        assert torch.equal(weights[name], weight)
    assert not sparse_layers(back)
    assert pack_weights(back, patterns) == []
    assert sparse_layers(back) == sparse_layers(small)


def test_what_does_not_obey_stays_dense() -> None:
    program = sparse()[0].copy()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert pack_weights(program, {name: (1, 4)}) == [name]
    assert pack_weights(program, {name: (1, 3)}) == [name]
    # The embedding is read by no linear layer.
    assert pack_weights(program, {"model.embed_tokens.weight": (4, 4)}) != []
    assert not sparse_layers(program)


def test_optimize_merges_layers_of_one_pattern() -> None:
    small = sparse()[1]
    merged = apply(small, Optimize())
    assert sparse_layers(merged) == {
        "q_proj+k_proj.values": "2:4", "v_proj.values": "1:4", "o_proj.values": "4:8",
        "gate_proj+up_proj.values": "2:8", "down_proj.values": "8:16",
    }  # fmt: skip
    parts = [dense_of(small, name) for name in ("q_proj", "k_proj")]
    assert torch.equal(dense_of(merged, "q_proj+k_proj"), torch.cat(parts))
    torch.testing.assert_close(logits(merged), logits(small))


@pytest.mark.parametrize("is_merged", [False, True])
def test_shares_stay_packed(is_merged: bool) -> None:
    dense, small = sparse()
    program = apply(small, Optimize(), check=False) if is_merged else small
    shares = shares_of(program, 2)
    for share in shares:
        assert len(sparse_layers(share)) == len(sparse_layers(program))
        assert not any("whole" in line and "mlp" in line for line in share.history[-1].summary)
    for found in run_shares(shares, VALUES):
        torch.testing.assert_close(found, logits(dense), rtol=1e-4, atol=1e-5)
    held, whole = (
        sum(w.nbytes for name, w in p.weights() if name.endswith(LEAVES))
        for p in (shares[0], program)
    )
    assert held == whole // 2


def test_a_share_whose_rows_are_no_whole_groups_is_dense_and_says_so() -> None:
    # Half of the 96 columns are no multiple of 32.
    pattern = {"down_proj": (8, 32), "o_proj": (4, 8)}
    pruned = prune(capture(models.llama(num_hidden_layers=1)), pattern)
    shares = shares_of(packed(pruned, pattern), 2)
    assert list(sparse_layers(shares[0])) == ["o_proj.values"]
    assert any(
        "dense on every process: model.layers.*.mlp.down_proj.weight" in line
        for line in shares[0].history[-1].summary
    )
    for found in run_shares(shares, VALUES):
        torch.testing.assert_close(found, logits(pruned), rtol=1e-4, atol=1e-5)


def test_heads_are_pruned_first() -> None:
    with pytest.raises(ContractError, match="prune"):
        apply(sparse()[1], PruneHeads(sparsity=0.25))


def test_save_and_load(tmp_path: Path) -> None:
    dense, small = sparse()
    small.save(tmp_path / "small")
    loaded = Program.load(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(small))
    assert sparse_layers(loaded) == sparse_layers(small)
    dense.save(tmp_path / "dense")
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / name).rglob("*.safetensors"))
        for name in ("small", "dense")
    ]
    stored = [sum(w.nbytes for _, w in program.weights()) for program in (small, dense)]
    assert abs((sizes[1] - sizes[0]) - (stored[1] - stored[0])) < 4096
    assert sizes[0] < sizes[1]
