"""``spin`` step by step: chunks, single tokens, beams, shared prefixes, generation with images."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import fxgraft
from fxgraft import images
from fxgraft.backend import find_backend
from fxgraft.errors import InputError
from fxgraft.passes.optimize import Optimize
from fxgraft.passes.spin import Spin
from fxgraft.program import Program
from fxgraft.state import StepProgram, insert_state
from fxgraft.stepping import StateModel
from fxgraft.transform import apply
from tests.passes import _spin, _vision_models
from tests.passes._vision_models import IMAGE, Case

SCORES = ["logit_sum", "mass"]
PROMPT = 20
EAGER = {"mode": "eager"}
NO_TOKEN = 1000


def case(name: str = "llava") -> Case:
    return _vision_models.MODELS[name]()


@cache
def guided(score: str, rows: str = "last", name: str = "llava") -> Program:
    step = Spin(heads=2, score=cast(Any, score), rows=cast(Any, rows))
    return apply(case(name).program(), step, check=False)


@cache
def steps(score: str, rows: str = "last", name: str = "llava") -> StepProgram:
    return insert_state(images.language_model(guided(score, rows, name)))


def runner(step: StepProgram) -> StateModel:
    return StateModel(step, lambda values: step.program.graph_module(*values))


def values_of(program: Program, name: str = "llava") -> dict[str, Tensor]:
    """Inputs of the language model for two texts, padded on the left, with their prompts' ends."""
    given = case(name).inputs(["ttItttttt", "tItttt"])
    ids = given["input_ids"]
    features = images.encode(images.image_encoder(program), case(name).images)
    embeds = images.place(features, ids, (IMAGE,))
    values = {name: given[name] for name in ("input_ids", "attention_mask")}
    lengths = given["attention_mask"][:, :PROMPT].sum(1)
    language = images.language_model(program)
    if "prompt_length" in {spec.name for spec in language.inputs}:
        values["prompt_length"] = lengths
    return {**values, images.EMBEDS: embeds}


def taken_in(
    model: StateModel, values: dict[str, Tensor], state: list[Tensor], start: int, end: int
) -> tuple[Tensor, list[Tensor]]:
    """Tokens ``start`` to ``end``."""
    other = {images.EMBEDS: values[images.EMBEDS][:, start:end]}
    if "prompt_length" in values:
        other["prompt_length"] = values["prompt_length"]
    ids, mask = values["input_ids"], values["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
    return model.step(ids[:, start:end], mask[:, :end], positions, state, other)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("rows", ["last", "all_text"])
@pytest.mark.parametrize(
    "cuts", [(PROMPT,), (1, 5, 11, 19), (4, 8, 12, 16, 20), tuple(range(1, 24))]
)
def test_any_chunks_equal_the_whole(score: str, rows: str, cuts: tuple[int, ...]) -> None:
    """Cuts go through the image, too; answers are gated whatever the prompt's chunks were."""
    program = guided(score, rows)
    values = values_of(program)
    whole = images.language_model(program)(**values)[0]
    length = whole.shape[1]
    model = runner(steps(score, rows))
    state, start = model.empty_state(2), 0
    for end in [*(cut for cut in cuts if cut < length), *range(max(cuts) + 1, length + 1)]:
        logits, state = taken_in(model, values, state, start, end)
        real = values["attention_mask"][:, end - 1].bool()
        torch.testing.assert_close(logits[real], whole[real, end - 1], atol=2e-5, rtol=1e-4)
        start = end
    assert start == length


@pytest.mark.parametrize("name", _vision_models.SIZED)
@pytest.mark.parametrize("cuts", [(1, 4, 9, 10), tuple(range(1, 13))])
def test_any_chunks_of_images_with_sizes(name: str, cuts: tuple[int, ...]) -> None:
    """Positions go on where the chunk before ended, inside an image as well."""
    program = guided("logit_sum", "all_text", name)
    values = values_of(program, name)
    whole = images.language_model(program)(**values)[0]
    model = runner(steps("logit_sum", "all_text", name))
    state, start = model.empty_state(2), 0
    for end in [*cuts, whole.shape[1]]:
        logits, state = taken_in(model, values, state, start, end)
        real = values["attention_mask"][:, end - 1].bool()
        torch.testing.assert_close(logits[real], whole[real, end - 1], atol=2e-5, rtol=1e-4)
        start = end


@pytest.mark.parametrize("score", SCORES)
def test_beams_and_copies_of_a_prefix(score: str) -> None:
    """Whoever copies rows of the state copies the image's summed keys with them."""
    program = guided(score)
    values = values_of(program)
    model = runner(steps(score))
    _, state = taken_in(model, values, model.empty_state(2), 0, PROMPT)
    order = torch.tensor([1, 1, 0, 1])
    beams = {name: value[order] for name, value in values.items()}
    beams["input_ids"] = beams["input_ids"].clone()
    beams["input_ids"][:, PROMPT:] = torch.arange(4, 4 + 4 * 5).view(4, 5)[
        :, : beams["input_ids"].shape[1] - PROMPT
    ]
    logits, after = taken_in(model, beams, model.select(state, order), PROMPT, PROMPT + 1)
    again = torch.tensor([3, 0, 0, 2])
    beams = {name: value[again] for name, value in beams.items()}
    logits, _ = taken_in(model, beams, model.select(after, again), PROMPT + 1, PROMPT + 2)
    cut = {
        name: value[:, : PROMPT + 2] if value.dim() > 1 else value for name, value in beams.items()
    }
    whole = images.language_model(program)(**cut)[0]
    torch.testing.assert_close(logits, whole[:, -1], atol=2e-5, rtol=1e-4)


def test_state_is_one_vector_per_key_head() -> None:
    states = {state.name.split(".")[1]: state for state in steps("logit_sum").states}
    assert states["key_sum"].shape == ("batch", 2, 8)
    assert states["key_sum"].dtype == torch.float32
    assert states["key_sum"].grows is None
    plain = insert_state(images.language_model(case().program()))
    extra = len(steps("logit_sum").states) - len(plain.states)
    assert extra == 1 + 2  # one automaton, and one sum for each layer over text


def reference_generate(count: int, score: str | None, name: str = "llava") -> Tensor:
    """Greedy tokens of the original model, with the written-out method, without a cache."""
    model: Any = case(name).model
    values = case(name).prompts(["ttIttt", "tItt"])
    prompt = values["input_ids"].shape[1]
    for _ in range(count):
        ids, mask = values["input_ids"], values["attention_mask"]
        image, gated = _spin.text_behind_images(ids, mask, IMAGE)
        gated[:, : prompt - 1] = False
        reference = _spin.Reference(2, 0.0, image, gated, score or "logit_sum")
        if score is None:
            reference.layers = range(0)
        with _spin.active(model, reference), torch.no_grad():
            logits = model(**values, use_cache=False).logits[:, -1]
        token = logits.argmax(-1, keepdim=True)
        values["input_ids"] = torch.cat([ids, token], 1)
        values["attention_mask"] = torch.cat([mask, torch.ones_like(token)], 1)
        types = case(name).types
        if types is not None:
            # Answers are no images, and are read in one direction.
            new = torch.full_like(token, int(types == "token_type_ids"))
            values[types] = torch.cat([values[types], new.to(values[types].dtype)], 1)
    return values["input_ids"]


def generated(program: Program, count: int, name: str = "llava") -> Tensor:
    """What the compiled model makes of the prompts of ``reference_generate``."""
    compiled = fxgraft.compile(program, backend="torch", options=EAGER)
    values = case(name).prompts(["ttIttt", "tItt"])
    found = compiled.generate(
        values["input_ids"], values["attention_mask"], images=case(name).images,
        max_new_tokens=count, eos_token_id=[],
    )  # fmt: skip
    # Who looks ahead in a prompt keeps no state of it.
    assert (compiled.state_problem is None) == (name != "paligemma")
    return found


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", _vision_models.MODELS)
def test_generate_equals_the_reference(name: str, score: str) -> None:
    found = generated(guided(score, name=name), 12, name)
    assert torch.equal(found, reference_generate(12, score, name))
    assert not torch.equal(found, reference_generate(12, None, name))


@pytest.mark.parametrize("name", _vision_models.MODELS)
def test_generate_without_the_pass_equals_transformers(name: str) -> None:
    found = generated(case(name).program(), 12, name)
    wanted = cast(Any, case(name).model).generate(
        **case(name).prompts(["ttIttt", "tItt"]), max_new_tokens=12, do_sample=False,
        pad_token_id=0, eos_token_id=NO_TOKEN,
    )  # fmt: skip
    assert torch.equal(found, wanted)
    assert torch.equal(found, reference_generate(12, None, name))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_another_number_of_images_than_captured(count: int) -> None:
    compiled = fxgraft.compile(case().program(), backend="torch", options=EAGER)
    texts = ["tItt", "ttIt", "Ittt", "tttI", "tIt"][:count]
    values = case().inputs(texts)
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(8))
    found = compiled.generate(
        values["input_ids"], values["attention_mask"], images={"pixel_values": pixels},
        max_new_tokens=4, eos_token_id=[],
    )  # fmt: skip
    wanted = cast(Any, case().model).generate(
        **{**values, "pixel_values": pixels}, max_new_tokens=4, do_sample=False, pad_token_id=0,
        eos_token_id=NO_TOKEN,
    )  # fmt: skip
    assert torch.equal(found, wanted)


def sized(name: str) -> tuple[Program, str, int]:
    """A model captured with its first image, the input that holds sizes, and rows per image."""
    whole = case(name)
    key = next(key for key in whole.images if key != "pixel_values")
    rows = whole.images["pixel_values"].shape[0] * 3 // 7 if "qwen" in name else 1
    first = {"pixel_values": whole.images["pixel_values"][:rows], key: whole.images[key][:1]}
    program = fxgraft.capture(whole.model, {**whole.prompts(["ttIt", "tt"]), **first})
    return program, key, rows


@pytest.mark.parametrize("name", _vision_models.SIZED)
def test_more_images_of_the_captured_size(name: str) -> None:
    program, key, rows = sized(name)
    compiled = fxgraft.compile(program, backend="torch", options=EAGER)
    shape = (3 * rows, *case(name).images["pixel_values"].shape[1:])
    given = {
        "pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(8)),
        key: case(name).images[key][:1].repeat(3, 1),
    }
    count = case(name).tokens
    values = {**case(name).prompts(["tItIt", "ttItt"], (count,) * 3), **given}
    found = compiled.generate(
        values["input_ids"], values["attention_mask"], images=given, max_new_tokens=6,
        eos_token_id=[],
    )  # fmt: skip
    wanted = cast(Any, case(name).model).generate(
        **values, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=NO_TOKEN
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", _vision_models.SIZED)
def test_other_sizes_are_refused(name: str) -> None:
    program, key, rows = sized(name)
    encoder = images.image_encoder(program)
    wrong = case(name).images[key][1:]
    pixels = case(name).images["pixel_values"]
    with pytest.raises(InputError, match=f"'{key}' is .*, the model was captured for"):
        images.encode(encoder, {"pixel_values": pixels[:rows], key: wrong})
    both = {"pixel_values": pixels[: 2 * rows], key: case(name).images[key]}
    with pytest.raises(InputError, match=r"the model was captured for|has \d+ rows"):
        images.encode(encoder, both)
    ragged = {"pixel_values": pixels[: rows + 1], key: wrong.repeat(3, 1)}
    with pytest.raises(InputError, match=f"{rows + 1} rows for 3 images"):
        images.encode(encoder, ragged)
    left_out = images.encode(encoder, {"pixel_values": pixels[:rows]})
    assert left_out.shape[0] == case(name).tokens


def test_recomputing_gates_what_stepping_gates() -> None:
    """Where no state can be kept, the rows of the prompt stay as they were."""
    from fxgraft.stepping import RecomputeModel

    program = guided("logit_sum")
    values = values_of(program)
    language = images.language_model(program)
    slow = RecomputeModel(language, lambda given: language.graph_module(*given))
    fast = runner(steps("logit_sum"))
    states: list[Any] = [slow.empty_state(2), fast.empty_state(2)]
    values.pop("prompt_length")
    for start, end in [(0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 2)]:
        one, states[0] = taken_in(cast(Any, slow), values, states[0], start, end)
        other, states[1] = taken_in(fast, values, states[1], start, end)
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("score", SCORES)
def test_onnx_runs_the_language_model(score: str, tmp_path: Path) -> None:
    """``export_onnx`` itself compares prefill, chunks and steps in onnxruntime."""
    problem = find_backend("onnx").available()
    if problem is not None:
        pytest.skip(problem)
    language = images.language_model(guided(score))
    folder = fxgraft.export_onnx(language, tmp_path / "onnx")
    assert {"prefill.onnx", "decode.onnx"} <= {path.name for path in folder.iterdir()}
    compiled = fxgraft.compile(guided(score), backend="onnx")
    values = case().inputs(["ttIttt", "tItt"])
    found = compiled.generate(
        values["input_ids"], values["attention_mask"], images=case().images, max_new_tokens=6,
        eos_token_id=[],
    )  # fmt: skip
    assert torch.equal(found, reference_generate(6, score))


def test_optimized_models_are_guided_alike() -> None:
    values = case().inputs(["ttItttt", "tIt"])
    step = Spin(heads=2, rows="all_text")
    optimized = apply(apply(case().program(), Optimize()), step, check=False)
    real = values["attention_mask"].bool()
    plain = apply(case().program(), step, check=False)
    torch.testing.assert_close(
        optimized(**values)[0][real], plain(**values)[0][real], atol=1e-5, rtol=1e-5
    )
