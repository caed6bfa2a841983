"""``prune_heads``: removing heads equals zeroing them before the output projection (H2)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fxgraft.errors import InputError
from fxgraft.frontends.capture import capture
from fxgraft.passes.optimize import Optimize
from fxgraft.passes.prune_heads import PruneHeads
from fxgraft.program import Program
from fxgraft.state import insert_state
from fxgraft.transform import apply
from tests import models
from tests.core.test_state import inputs_of, run_steps

HEADS, WIDTH = 4, 16


@contextmanager
def zeroed(model: nn.Module, suffix: str, removed: dict[int, list[int]]) -> Generator[None]:
    """Zero heads on the original model, by hooks on its output projections."""
    projections = [m for name, m in model.named_modules() if name.endswith(suffix)]
    handles = [
        projections[layer].register_forward_pre_hook(_zero(indices))
        for layer, indices in removed.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zero(indices: list[int]) -> Callable[..., tuple[torch.Tensor]]:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        x = args[0].clone()
        for head in indices:
            x[..., head * WIDTH : (head + 1) * WIDTH] = 0
        return (x,)

    return hook


def check_equals_masked(
    model: nn.Module, program: Program, suffix: str, removed: dict[int, list[int]]
) -> Program:
    pruned = apply(program, PruneHeads(heads=removed, min_heads=0), check=False)
    values = inputs_of(program, batch=3)
    with zeroed(model, suffix, removed), torch.no_grad():
        wanted = model(**values, use_cache=False).logits
    seen = values["attention_mask"].bool()
    torch.testing.assert_close(pruned(**values)[0][seen], wanted[seen], atol=1e-5, rtol=1e-4)
    return pruned


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, Program]:
    model = models.llama(num_hidden_layers=2)
    return model, capture(model)


def test_every_subset_of_a_layer(llama: tuple[nn.Module, Program]) -> None:
    for size in range(1, HEADS + 1):
        for subset in itertools.combinations(range(HEADS), size):
            check_equals_masked(*llama, "o_proj", {1: list(subset)})


def test_random_subsets_of_all_layers(llama: tuple[nn.Module, Program]) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        chosen = torch.rand(2, HEADS, generator=generator) < 0.5
        removed = {layer: row.nonzero().flatten().tolist() for layer, row in enumerate(chosen)}
        check_equals_masked(*llama, "o_proj", removed)


@pytest.mark.parametrize(
    ("build", "suffix"),
    [
        (models.gpt2, "attn.c_proj"),
        (models.opt, "out_proj"),
        (models.gemma2, "o_proj"),
        (models.mistral, "o_proj"),
        # Only some channels of each head rotate.
        (models.phi, "self_attn.dense"),
        (models.gpt_neox, "attention.dense"),
        (models.gpt_oss, "o_proj"),
    ],
)
def test_architectures(build: Callable[[], nn.Module], suffix: str) -> None:
    model = build()
    program = capture(model)
    check_equals_masked(model, program, suffix, {0: [0, 3], 1: [1]})
    check_equals_masked(model, program, suffix, {0: [0, 1, 2, 3]})


def test_shapes_and_state_shrink(llama: tuple[nn.Module, Program]) -> None:
    model, program = llama
    pruned = check_equals_masked(model, program, "o_proj", {0: [0, 1], 1: [3]})
    assert pruned.weight("model.layers.0.self_attn.q_proj.weight").shape == (2 * WIDTH, 64)
    assert pruned.weight("model.layers.0.self_attn.k_proj.weight").shape == (WIDTH, 64)
    assert pruned.weight("model.layers.1.self_attn.k_proj.weight").shape == (2 * WIDTH, 64)
    assert pruned.weight("model.layers.1.self_attn.o_proj.weight").shape == (64, 3 * WIDTH)
    assert pruned.count_parameters() < program.count_parameters()
    heads = [state.shape[1] for state in insert_state(pruned).states if state.name.endswith("key")]
    assert sum(int(count) for count in heads) == 3


def test_generates_with_state(llama: tuple[nn.Module, Program]) -> None:
    _, program = llama
    pruned = apply(program, PruneHeads(heads={0: [0], 1: [2, 3]}))
    values = inputs_of(pruned, batch=2)
    whole = pruned(**values)[0]
    cuts = [5, 6, 7, 19]
    for end, logits in zip(cuts, run_steps(insert_state(pruned), values, cuts), strict=True):
        seen = values["attention_mask"][:, end - 1].bool()
        torch.testing.assert_close(logits[seen], whole[seen, end - 1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_composes_with_optimize(llama: tuple[nn.Module, Program], first: bool) -> None:
    model, program = llama
    removed = {0: [0, 2], 1: [1, 2, 3]}
    order = [Optimize(), PruneHeads(heads=removed)]
    for item in order if first else reversed(order):
        program = apply(program, item)
    values = inputs_of(program, batch=3)
    with zeroed(model, "o_proj", removed), torch.no_grad():
        wanted = model(**values, use_cache=False).logits
    seen = values["attention_mask"].bool()
    torch.testing.assert_close(program(**values)[0][seen], wanted[seen], atol=1e-5, rtol=1e-4)


def test_gradients_of_kept_heads_equal_the_masked_model(
    llama: tuple[nn.Module, Program],
) -> None:
    model, program = llama
    pruned = apply(program, PruneHeads(heads={0: [1]}), check=False)
    values = inputs_of(program, batch=2)
    for parameter in pruned.graph_module.parameters():
        parameter.requires_grad_(True)
    pruned.graph_module(*pruned.bind(**values))[0].square().mean().backward()
    with zeroed(model, "o_proj", {0: [1]}):
        model(**values, use_cache=False).logits.square().mean().backward()
    # The full group comes first: heads 2 and 3, then head 0 of the group that lost one.
    kept = [*range(2 * WIDTH, HEADS * WIDTH), *range(WIDTH)]
    name = "model.layers.0.self_attn.o_proj.weight"
    wanted = model.get_parameter(name).grad
    got = pruned.weight(name).grad
    assert wanted is not None
    assert got is not None
    torch.testing.assert_close(got, wanted[:, kept], atol=1e-5, rtol=1e-4)


def test_neutral_is_the_identity(llama: tuple[nn.Module, Program]) -> None:
    _, program = llama
    same = apply(program, PruneHeads())
    values = program.example(seed=1)
    assert torch.equal(same(**values)[0], program(**values)[0])
    assert not same.diff(program)


@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_sparsity(llama: tuple[nn.Module, Program], scope: str) -> None:
    _, program = llama
    pruned = apply(program, PruneHeads.from_config({"sparsity": 0.5, "scope": scope}))
    assert "4 of 8 query heads" in pruned.history[-1].summary[0]


def test_scores_from_a_file(llama: tuple[nn.Module, Program], tmp_path: Path) -> None:
    _, program = llama
    path = tmp_path / "scores.safetensors"
    save_file({"scores": torch.tensor([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]])}, path)
    pruned = apply(program, PruneHeads(sparsity=0.25, scores=path), check=False)
    by_hand = apply(program, PruneHeads(heads={0: [0, 1]}), check=False)
    values = program.example()
    assert torch.equal(pruned(**values)[0], by_hand(**values)[0])
    save_file({"scores": torch.full((2, 4), float("nan"))}, path)
    with pytest.raises(InputError, match="not finite"):
        apply(program, PruneHeads(sparsity=0.25, scores=path))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match="cannot be used"):
        apply(program, PruneHeads(sparsity=0.25, scores=path))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2.0])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(InputError, match="sparsity"):
        PruneHeads(sparsity=sparsity)


@pytest.mark.parametrize("heads", [{5: [0]}, {0: [4]}])
def test_heads_that_do_not_exist(
    llama: tuple[nn.Module, Program], heads: dict[int, list[int]]
) -> None:
    with pytest.raises(InputError, match="existing"):
        apply(llama[1], PruneHeads(heads=heads))
