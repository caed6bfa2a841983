"""``spin``: settings, spans and models that cannot work are refused, each with its reason."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import fxgraft
from fxgraft import graph as graphs
from fxgraft.errors import ContractError, InputError
from fxgraft.passes.prune_heads import PruneHeads
from fxgraft.passes.spin import Spin
from fxgraft.program import Program
from fxgraft.transform import apply
from tests import models
from tests.passes import _vision_models


@cache
def llama() -> Program:
    return fxgraft.capture(models.llama(num_hidden_layers=2))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"keep": 0.0}, "keep"),
        ({"keep": -0.1}, "keep"),
        ({"keep": 1.01}, "keep"),
        ({"keep": math.nan}, "keep"),
        ({"heads": -1}, "heads"),
        ({"factor": -0.5}, "factor"),
        ({"factor": math.nan}, "factor"),
        ({"factor": 1.5}, "'factor' is 1.5, over 1"),
        ({"layers": (3, 1)}, r"'layers' is no range: \[3, 1\]"),
        ({"layers": (-1, 1)}, r"'layers' is no range: \[-1, 1\]"),
        ({"span": (-2, 4)}, r"'span' is no range: \[-2, 4\]"),
        ({"span": (4, 2)}, r"'span' is no range: \[4, 2\]"),
        ({"span": (4, 4)}, r"'span' is empty: \[4, 4\]"),
        ({"rows": "first"}, "rows"),
        ({"score": "norm"}, "score"),
        ({"ratio": 0.5}, "ratio"),
    ],
)
def test_settings(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Spin(**fields)


def test_a_factor_above_one_may_be_allowed() -> None:
    assert Spin(factor=1.5, amplify=True).factor == 1.5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "where they are is not known"),
        ({"image_tokens": ()}, r"'image_tokens' is \[\]"),
        ({"image_tokens": (4, 128)}, "token ids 0 to 127"),
        ({"image_tokens": (-1,)}, "token ids 0 to 127"),
        ({"span": (0, 4), "layers": (0, 3)}, "'layers' ends at 3, the language model has 2"),
        ({"span": (0, 4), "heads": 5}, "keeps 5 heads, layer 0 has 4"),
    ],
)
def test_settings_that_do_not_fit_the_model(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        apply(llama(), Spin(**fields))
    assert caught.value.remedy


def test_a_span_outside_the_context() -> None:
    limit = cast(int, llama().origin["context_length"])
    with pytest.raises(InputError, match=f"outside the model's context of {limit}"):
        apply(llama(), Spin(span=(limit - 1, limit + 1)))


def test_a_span_outside_the_sequence_gates_nothing() -> None:
    """No row lies behind it, so no score is taken of keys that are not there."""
    program = apply(llama(), Spin(span=(6, 40), heads=1, rows="all_text"))
    ids = torch.arange(4, 24).view(2, 10)
    assert torch.equal(program(ids)[0], llama()(ids)[0])


def test_a_span_counts_tokens_and_not_padding() -> None:
    program = apply(llama(), Spin(span=(1, 4), heads=1, rows="all_text"))
    ids = torch.arange(4, 14)[None]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = (torch.arange(13) >= 3).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    alone, found = program(ids)[0], program(padded, mask, positions)[0]
    torch.testing.assert_close(found[:, 3:], alone, atol=1e-5, rtol=1e-5)


def test_no_image_in_the_prompt_is_said_once_and_changes_nothing() -> None:
    program = _vision_models.llava().program()
    plain, guided = (
        fxgraft.compile(p, backend="torch", options={"mode": "eager"})
        for p in (program, apply(program, Spin(heads=1), check=False))
    )
    ids = torch.arange(4, 16).view(2, 6)
    with pytest.warns(UserWarning, match="'spin' changes nothing") as said:
        found = guided.generate(ids, max_new_tokens=6)
    assert len(said) == 1
    assert torch.equal(found, plain.generate(ids, max_new_tokens=6))


@pytest.mark.parametrize(
    ("build", "reason", "layers"),
    [(models.mistral, "sliding window", 3), (models.gemma2, "soft cap", 3)],
)
def test_layers_without_the_identity_sum_their_logits(build: Any, reason: str, layers: int) -> None:
    """The history names them, and the logits are those after the cap and inside the window."""
    program = fxgraft.capture(build())
    step = Spin(span=(1, 4), heads=2, rows="all_text")
    guided = apply(program, step)
    line = guided.history[-1].summary[1]
    assert f"in {layers} layers" in line
    assert f"layer 0: {reason}" in line
    targets = [node.target for node in guided.graph.nodes]
    assert targets.count(torch.ops.fxgraft.attention_mass.default) == layers
    assert torch.ops.fxgraft.logit_sum.default not in targets
    ids = torch.arange(4, 24).view(2, 10)
    assert not torch.allclose(guided(ids)[0], program(ids)[0])


def test_image_keys_that_a_window_dropped_do_not_count() -> None:
    """Behind the window nothing of the image is seen: all heads tie, and the first ones stay."""
    program = fxgraft.capture(models.mistral(num_hidden_layers=1))
    guided = apply(program, Spin(span=(0, 2), heads=2, rows="all_text"), check=False)
    score = next(node for node in guided.graph.nodes if node.name.startswith("head_score"))
    guided.graph.output_node().args = ((score,),)
    guided.outputs = ("score",)
    graphs.finish(guided.graph_module)
    (scores,) = cast("tuple[Tensor]", guided(torch.arange(4, 24).view(2, 10)))
    assert bool((scores[:, :, 2:7] != 0).all())
    assert not scores[:, :, 7:].any()


def test_heads_that_were_pruned_unevenly_are_refused() -> None:
    pruned = apply(llama(), PruneHeads(heads={0: [1]}))
    with pytest.raises(Exception, match="divided among several attentions"):
        apply(pruned, Spin(span=(0, 4)))


def test_heads_that_were_pruned_evenly_are_ranked() -> None:
    pruned = apply(llama(), PruneHeads(heads={0: [1, 2], 1: [0, 3]}))
    guided = apply(pruned, Spin(span=(0, 4), keep=0.5, rows="all_text"))
    assert guided.history[-1].summary[0].startswith("1 of 2 heads kept")


def test_images_for_a_model_without() -> None:
    compiled = fxgraft.compile(llama(), backend="torch", options={"mode": "eager"})
    with pytest.raises(InputError, match="writes no images"):
        compiled.generate(torch.tensor([[4, 5]]), images={"pixel_values": torch.zeros(2, 3, 8, 8)})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "image input 'pixel_values' is missing"),
        ({"pixel_values": torch.zeros(2, 3, 8, 8)}, "input 'pixel_values' has shape"),
        ({"pixel_values": torch.zeros(3, 3, 32, 32)}, "have 32 image tokens, the images 48"),
        ({"pictures": torch.zeros(2, 3, 32, 32)}, "image input 'pixel_values' is missing"),
    ],
)
def test_images_that_do_not_fit(given: dict[str, Tensor], words: str) -> None:
    case = _vision_models.llava()
    compiled = fxgraft.compile(case.program(), backend="torch", options={"mode": "eager"})
    values = case.inputs(["tIt", "ttIt"])
    with pytest.raises(InputError, match=words):
        compiled.generate(values["input_ids"], values["attention_mask"], images=given)


def test_a_step_graph_is_too_late() -> None:
    step = fxgraft.insert_state(llama())
    with pytest.raises(ContractError, match="stateless"):
        apply(step.program, Spin(span=(0, 4)))
