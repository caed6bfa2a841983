"""Experts under ``flow``: their stacked weights are packed, and give what masked ones give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import fxgraft
from fxgraft import sparsity
from fxgraft.frontends.capture import capture
from fxgraft.kernels.spec import argument
from fxgraft.packed_weights import pack_weights, unpack_weights
from fxgraft.passes.flow import Flow
from fxgraft.passes.flow import units as layers
from fxgraft.passes.optimize import Optimize
from fxgraft.program import Program
from fxgraft.state import insert_state
from fxgraft.transform import apply
from fxgraft.weight_products import weight_products
from tests import models
from tests.core.test_state import inputs_of, run_steps
from tests.passes import _flow
from tests.passes._ranks import run_shares, shares_of

NM: Any = torch.ops.fxgraft.nm_linear.default
SIZES: dict[str, Any] = {
    "vocab_size": models.VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def qwen2_moe() -> nn.Module:
    """Experts in a grouped product, and one that all tokens share."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **SIZES, intermediate_size=96, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=48, shared_expert_intermediate_size=64,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config).eval()


def llama4() -> nn.Module:
    """All tokens for each expert, in a batched product."""
    torch.manual_seed(0)
    config = Llama4TextConfig(
        **SIZES, head_dim=16, intermediate_size=48, intermediate_size_mlp=96,
        num_local_experts=4, moe_layers=[0, 1],
    )  # fmt: skip
    return Llama4ForCausalLM(config).eval()


BUILDERS = [models.mixtral, qwen2_moe, models.gpt_oss, llama4]


def pruned_of(program: Program, folder: Path, **changes: Any) -> Program:
    data = _flow.write_tokens(folder)
    step = _flow.flow(data, **({"criterion": "uniform", "m": (4,)} | changes))
    return apply(program, step, check=False)


def expert_nodes(program: Program) -> list[torch.fx.Node]:
    nodes = program.graph.find_nodes(op="call_function", target=NM)
    return [node for node in nodes if argument(node, "ends") is not None]


def masked(program: Program, pruned: Program) -> Program:
    """The dense Program with the pruned one's weights, zeros written out."""
    copy = program.copy()
    units = layers.find(program).units
    products = [p for p in weight_products(pruned).values() if p.pattern is not None]
    for unit, product in zip(units, products, strict=True):
        matrices = product.matrices(pruned)[..., : unit.product.reduction]
        old = program.weight(unit.weight)
        copy.set_weight(unit.weight, nn.Parameter(unit.write(old, matrices), requires_grad=False))
    return copy


def assert_same_logits(one: Program, other: Program) -> None:
    values = inputs_of(one, batch=3)
    seen = values["attention_mask"].bool()
    torch.testing.assert_close(one(**values)[0][seen], other(**values)[0][seen])


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_logits_are_those_of_masked_weights(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    program = capture(build())
    pruned = pruned_of(program, tmp_path)
    experts = [unit for unit in layers.find(program).units if unit.product.copies > 1]
    nodes = expert_nodes(pruned)
    assert len(nodes) == len(experts) > 0
    products = weight_products(pruned)
    for node, unit in zip(nodes, experts, strict=True):
        product = products[node]
        assert (product.copies, product.outputs, product.reduction, product.pattern) == (
            4, unit.product.outputs, unit.product.reduction, (2, 4)
        )  # fmt: skip
        assert product.is_grouped
        kept = (product.matrices(pruned) != 0).view(-1, 4).sum(-1)
        assert torch.equal(kept, torch.full_like(kept, 2))
    assert not sparsity.declared(pruned)
    assert_same_logits(pruned, masked(program, pruned))


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_files_shrink_by_what_is_packed(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    program = capture(build())
    pruned = pruned_of(program, tmp_path)
    sizes: list[int] = []
    for name, each in (("dense", program), ("packed", pruned)):
        folder = each.save(tmp_path / name)
        sizes.append(sum(file.stat().st_size for file in folder.rglob("*.safetensors")))
    parameters = sum(unit.parameters for unit in layers.find(program).units)
    # In float32 half of the values and one bit for each of all: 2.125 of 4 bytes.
    saved = parameters * 4 - parameters * (2 + 1 / 8)
    assert program.count_bytes() - pruned.count_bytes() == saved
    assert abs(sizes[0] - sizes[1] - saved) < 8192
    loaded = fxgraft.load(tmp_path / "packed")
    assert isinstance(loaded, Program)
    values = program.example(seed=2)
    assert torch.equal(loaded(**values)[0], pruned(**values)[0])
    assert not loaded.diff(pruned)


@pytest.mark.parametrize("build", [models.mixtral, llama4], ids=lambda build: build.__name__)
def test_padding_of_experts(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    program = capture(build())
    pruned = pruned_of(program, tmp_path, m=(32,), budget=0.25, pad=True)
    experts = [unit.product for unit in layers.find(program).units if unit.product.copies > 1]
    products = weight_products(pruned)
    widths = [products[node].reduction for node in expert_nodes(pruned)]
    assert widths == [-(-product.reduction // 32) * 32 for product in experts]
    assert (widths != [product.reduction for product in experts]) == (build is llama4)
    assert_same_logits(pruned, masked(program, pruned))


def test_unpacked_and_packed_again(tmp_path: Path) -> None:
    for build in (models.mixtral, llama4):
        program = capture(build())
        small = pruned_of(program, tmp_path)
        back = small.copy()
        patterns = unpack_weights(back)
        assert not list(back.graph.find_nodes(op="call_function", target=NM))
        names = {name for name in patterns if "experts" in name}
        assert names == {u.weight for u in layers.find(program).units if u.product.copies > 1}
        assert_same_logits(back, small)
        assert pack_weights(back, patterns) == []
        assert len(expert_nodes(back)) == len(names)
        weights = dict(back.weights())
        for name, value in small.weights():
            assert torch.equal(weights[name], value), name


def test_shares_of_experts_stay_packed(tmp_path: Path) -> None:
    small = pruned_of(capture(models.mixtral(num_hidden_layers=1)), tmp_path)
    values = {
        "input_ids": torch.tensor([[5, 9, 17, 3, 8], [4, 11, 2, 7, 60]]),
        "attention_mask": torch.ones(2, 5, dtype=torch.int64),
    }
    shares = shares_of(small, 2)
    for share in shares:
        assert len(expert_nodes(share)) == 2
        held = sum(w.nbytes for name, w in share.weights() if "experts" in name)
        whole = sum(w.nbytes for name, w in small.weights() if "experts" in name)
        assert held == whole // 2
    for found in run_shares(shares, values):
        torch.testing.assert_close(found, small(**values)[0], rtol=1e-4, atol=1e-5)


def test_steps(tmp_path: Path) -> None:
    pruned = pruned_of(capture(models.mixtral()), tmp_path)
    values = inputs_of(pruned, batch=2)
    whole, ends = pruned(**values)[0], [5, 6, 19]
    for end, logits in zip(ends, run_steps(insert_state(pruned), values, ends), strict=True):
        seen = values["attention_mask"][:, end - 1].bool()
        torch.testing.assert_close(logits[seen], whole[seen, end - 1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("build", [models.mixtral, llama4], ids=lambda build: build.__name__)
def test_optimize_leaves_experts_whole(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    pruned = pruned_of(capture(build()), tmp_path)
    optimized = apply(pruned, Optimize(), check=False)
    assert len(expert_nodes(optimized)) == len(expert_nodes(pruned))
    assert_same_logits(optimized, pruned)


@pytest.mark.parametrize("build", [models.mixtral, llama4], ids=lambda build: build.__name__)
def test_onnx(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    pruned = pruned_of(capture(build()), tmp_path)
    ids = _flow.tokens(2, 5, seed=4)
    found: list[tuple[Tensor, Tensor]] = []
    for backend in ("torch", "onnx"):
        compiled = fxgraft.compile(pruned, backend=backend, check=False)
        tokens = compiled.generate(ids, max_new_tokens=6, eos_token_id=[])
        found.append((compiled(ids).logits, tokens))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0][1], found[1][1])


class WeightFirst(nn.Module):
    """A block whose product is W x, columns for tokens, which the op does not compute."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 16]."""
        x = x + self.inner(x).relu()
        return x + torch.matmul(self.weight, x.T).T


class Stack(nn.Module):
    """Two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([WeightFirst(), WeightFirst()])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 16]."""
        for layer in cast("Sequence[nn.Module]", self.layers):
            x = layer(x)
        return x


def test_other_products_keep_zeros_that_are_declared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = capture(Stack().eval(), {"x": torch.randn(4, 16)})
    save_file({"x": torch.randn(8, 16)}, tmp_path / "x.safetensors")
    step = Flow(data=(tmp_path / "x.safetensors",), samples=8, criterion="uniform", m=(4,))
    pruned = apply(program, step, check=False)
    assert set(sparsity.declared(pruned)) == {f"layers.{index}.weight" for index in (0, 1)}
    for name in sparsity.declared(pruned):
        kept = (pruned.weight(name) != 0).view(-1, 4).sum(-1)
        assert torch.equal(kept, torch.full_like(kept, 2))
    assert "2 weights stay dense tensors with zeros" in pruned.history[-1].summary[-1]
