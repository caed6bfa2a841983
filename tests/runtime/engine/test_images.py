"""Prompts with images: the tokens of ``generate``, whatever chunks, neighbours and prefixes do."""

from __future__ import annotations

import gc
import weakref
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import fxgraft
from fxgraft import images
from fxgraft.errors import Error, InputError
from fxgraft.generation.options import SamplingOptions
from fxgraft.runtime.engine import Engine, EngineOptions, Request
from fxgraft.runtime.engine.image_encoder import ImageEncoder
from tests.passes import _vision_models
from tests.passes._vision_models import IMAGE, MODELS
from tests.runtime.engine._models import answers, assert_nothing_held, greedy, run
from tests.runtime.engine._models import engine_of as text_engine

BLOCK = 4
Images = dict[str, Tensor]


@cache
def compiled(positions: bool = False) -> fxgraft.Compiled:
    """LLaVA; with an input for positions, steps need no mask and may be captured."""
    case = _vision_models.llava()
    if not positions:
        program = case.program()
    else:
        example = case.inputs(["ttIttt", "tIt"])
        example["position_ids"] = (example["attention_mask"].cumsum(1) - 1).clamp(min=0)
        tokens = {name: {0: "batch", 1: "sequence"} for name in example if name != "pixel_values"}
        program = fxgraft.capture(case.model, example, dynamic=tokens)
    return fxgraft.compile(program, ["optimize"], backend="torch", options={"mode": "eager"})


def engine_of(positions: bool = False, **options: Any) -> Engine:
    """An engine with room for 4 requests."""
    values: dict[str, Any] = {
        "max_batch": 4, "max_context": 96, "memory_bytes": 2**21, "block_size": BLOCK,
        "chunk_tokens": 8,
    }  # fmt: skip
    return Engine(compiled(positions), EngineOptions(**{**values, **options}))


def prompt_of(row: str, seed: int = 0) -> list[int]:
    """Tokens: ``t`` for random text, ``I`` for a whole image."""
    generator = torch.Generator().manual_seed(seed)
    words: list[int] = torch.randint(4, 90, (len(row),), generator=generator).tolist()
    whole = [IMAGE] * _vision_models.llava().tokens
    pieces = [whole if c == "I" else [w] for c, w in zip(row, words, strict=True)]
    return [token for piece in pieces for token in piece]


def pixels(*seeds: int) -> Images:
    """One random image per seed."""
    drawn = [
        torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    return {"pixel_values": torch.stack(drawn)}


def alone(tokens: list[int], given: Images | None, sampling: SamplingOptions) -> list[int]:
    """What ``generate`` answers."""
    options: Any = sampling.model_dump(exclude_unset=True) | {"eos_token_id": []}
    result = compiled().generate([tokens], images=given, **options)
    return result[0, len(tokens) :].tolist()


def ask(engine: Engine, tokens: list[int], given: Images | None) -> Request:
    """A request, run to its end."""
    request = engine.submit(tokens, greedy(), images=given)
    run(engine)
    assert request.error is None
    return request


@pytest.mark.parametrize("chunk", [3, 8, 100])
@pytest.mark.parametrize("positions", [False, True])
def test_a_crowd_answers_as_each_alone(positions: bool, chunk: int) -> None:
    """Text, one image, several, none at the beginning or the end; chunks cut through images."""
    engine = engine_of(positions, chunk_tokens=chunk)
    assert engine.model.paged.needs_mask != positions
    asked = [
        (prompt_of("ttIttt", 1), pixels(1)),
        (prompt_of("ttttt", 2), None),
        (prompt_of("tIttIt", 3), pixels(2, 3)),
        (prompt_of("IIIt", 4), pixels(4, 5, 6)),
        (prompt_of("t", 5), None),
        (prompt_of("tI", 6), pixels(7)),
    ]
    requests: list[Request] = []
    for tokens, given in asked:
        requests.append(engine.submit(tokens, greedy(), images=given))
        engine.step()
    run(engine)
    assert answers(requests) == [alone(*one, greedy()) for one in asked]
    assert {request.finish_reason for request in requests} == {"length"}
    assert_nothing_held(engine)


@pytest.mark.parametrize("family", ["internvl", "smolvlm"])
def test_other_models(family: str) -> None:
    case = MODELS[family]()
    compiled = fxgraft.compile(case.program(), backend="torch", options={"mode": "eager"})
    engine = Engine(compiled, EngineOptions(max_batch=4, max_context=64, chunk_tokens=5))
    both = [5, *[IMAGE] * case.tokens, 6, *[IMAGE] * case.tokens, 7]
    one = [8, *[IMAGE] * case.tokens, 9]
    first = {name: value[:1] for name, value in case.images.items()}
    asked = [(both, case.images), (one, first)]
    requests = [engine.submit(ids, greedy(6), images=given) for ids, given in asked]
    run(engine)
    for request, (ids, given) in zip(requests, asked, strict=True):
        alone = compiled.generate([ids], images=given, max_new_tokens=6, eos_token_id=[])
        assert request.tokens == alone[0, len(ids) :].tolist()


def test_the_images_count() -> None:
    """Other pixels, other tokens: otherwise the comparisons above would say little."""
    tokens = prompt_of("ttIttt")
    found = {tuple(alone(tokens, pixels(seed), greedy())) for seed in range(6)}
    assert len(found) > 3


@pytest.mark.parametrize("lookahead", [False, True])
def test_sampling_with_a_seed(lookahead: bool) -> None:
    sampling = SamplingOptions(max_new_tokens=9, eos_token_id=(), do_sample=True, seed=3)
    tokens, given = prompt_of("tIttt"), pixels(1)
    engine = engine_of(lookahead=lookahead)
    crowd = [engine.submit(prompt_of("ttItt", seed=s), greedy(), images=pixels(s)) for s in (5, 6)]
    request = engine.submit(tokens, sampling, images=given)
    run(engine)
    assert request.tokens == alone(tokens, given, sampling)
    assert all(other.finish_reason == "length" for other in crowd)


def test_prefixes_with_other_images_are_not_shared() -> None:
    """Two blocks of text, then the image: only the text is the same."""
    engine = engine_of()
    tokens = prompt_of("tttttttttItttt")
    first, second = ask(engine, tokens, pixels(1)), ask(engine, tokens, pixels(2))
    assert (first.reused_tokens, second.reused_tokens) == (0, 2 * BLOCK)
    assert first.tokens == alone(tokens, pixels(1), greedy())
    assert second.tokens == alone(tokens, pixels(2), greedy())
    assert first.tokens != second.tokens
    again = ask(engine, tokens, pixels(1))
    assert again.reused_tokens >= len(tokens) - BLOCK
    assert again.tokens == first.tokens
    assert_nothing_held(engine)


def test_what_follows_an_image_depends_on_it() -> None:
    """Blocks of text behind another image hold other states."""
    engine = engine_of()
    tokens = prompt_of("I" + "t" * 13)
    for seed in (1, 2, 1):
        request = ask(engine, tokens, pixels(seed))
        assert request.tokens == alone(tokens, pixels(seed), greedy())
    assert request.reused_tokens >= 16 + 2 * BLOCK
    assert engine.stats().reused_tokens == request.reused_tokens


def test_a_second_image_leaves_the_first_ones_prefix() -> None:
    """As in a conversation that goes on with another image."""
    engine = engine_of()
    ask(engine, prompt_of("tttItttt"), pixels(1))
    longer = [*prompt_of("tttItttt"), *prompt_of("tItt", seed=9)]
    other = ask(engine, longer, pixels(1, 2))
    assert other.reused_tokens == 20
    assert other.tokens == alone(longer, pixels(1, 2), greedy())
    third = ask(engine, longer, pixels(1, 3))
    assert third.reused_tokens == 24
    assert third.tokens == alone(longer, pixels(1, 3), greedy())


def test_preempted_requests_see_their_images_again() -> None:
    engine = engine_of(prefix_reuse=False)
    for group in engine.memory.groups:
        # Leaves room for 18 whole pages.
        while group.can_take(19):
            group.take()
    asked = [(prompt_of("tItt", seed=seed), pixels(seed)) for seed in range(3)]
    requests = [engine.submit(tokens, greedy(14), images=given) for tokens, given in asked]
    run(engine)
    assert engine.stats().preemptions > 0
    assert max(len(request.tokens) for request in requests if request.preemptions) == 14
    assert answers(requests) == [alone(*one, greedy(14)) for one in asked]


def test_images_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all chunks, and for equal images of requests that run together."""
    encode, calls = images.encode, list[int]()

    def counted(encoder: Any, values: Any) -> Tensor:
        calls.append(len(values["pixel_values"]))
        return encode(encoder, values)

    monkeypatch.setattr(images, "encode", counted)
    engine = engine_of(chunk_tokens=2)
    tokens = prompt_of("tItIt")
    requests = [engine.submit(tokens, greedy(), images=pixels(1, 2)) for _ in range(3)]
    other = engine.submit(tokens, greedy(), images=pixels(2, 1))
    assert calls == [2, 2]
    run(engine)
    assert calls == [2, 2]
    assert len({tuple(request.tokens) for request in requests}) == 1
    assert other.tokens == alone(tokens, pixels(2, 1), greedy())


def test_features_are_freed_at_the_end() -> None:
    engine = engine_of()
    ends = [engine.submit(prompt_of("tIt"), greedy(2), images=pixels(1))]
    cancelled = [
        engine.submit(prompt_of("tIttt", seed=seed), greedy(30), images=pixels(seed))
        for seed in range(2, 8)
    ]
    held = [weakref.ref(r.images.features) for r in [*ends, *cancelled] if r.images is not None]
    assert len(held) == 7
    for _ in range(3):
        engine.step()
    for request in cancelled:
        engine.cancel(request)
    run(engine)
    gc.collect()
    assert [found() for found in held] == [None] * 7
    assert_nothing_held(engine)


WRONG: list[tuple[str, Images | dict[str, Any] | None, str]] = [
    ("tItt", None, "16 image tokens, its images have 0 features"),
    ("tItt", pixels(1, 2), "16 image tokens, its images have 32 features"),
    ("tIIt", pixels(1), "32 image tokens, its images have 16 features"),
    ("tttt", pixels(1), "0 image tokens, its images have 16 features"),
    ("tItt", {}, "'pixel_values' is missing"),
    ("tItt", {"pixels": torch.zeros(1, 3, 32, 32)}, "no image input 'pixels'"),
    ("tItt", {**pixels(1), "depth": torch.zeros(1)}, "no image input 'depth'"),
    ("tItt", {"pixel_values": torch.zeros(1, 3, 16, 16)}, r"\[images x 3 x 32 x 32\]"),
    ("tItt", {"pixel_values": torch.zeros(3, 32, 32)}, r"has shape \(3, 32, 32\)"),
    ("tItt", {"pixel_values": torch.zeros(0, 3, 32, 32)}, r"has shape \(0, 3, 32, 32\)"),
    ("tItt", {"pixel_values": torch.tensor(0.0)}, r"has shape \(\)"),
    ("tItt", {"pixel_values": torch.zeros(1, 3, 32, 32).long()}, "give it as torch.float32"),
    ("tItt", {"pixel_values": [[0.0]]}, "is a list"),
]


@pytest.mark.parametrize(("row", "given", "words"), WRONG)
def test_wrong_images_are_refused_before_anything_waits(row: str, given: Any, words: str) -> None:
    engine = engine_of()
    running = engine.submit(prompt_of("tItt"), greedy(), images=pixels(1))
    engine.step()
    with pytest.raises(InputError, match=words):
        engine.submit(prompt_of(row), greedy(), images=given)
    assert engine.stats().queued == 0
    run(engine)
    assert running.tokens == alone(prompt_of("tItt"), pixels(1), greedy())
    assert_nothing_held(engine)


def test_numbers_of_images_differ_between_inputs() -> None:
    case = _vision_models.smolvlm()
    given = {**case.images, "pixel_attention_mask": case.images["pixel_attention_mask"][:1]}
    tokens = [5, *[IMAGE] * 8, 6]
    encoder = ImageEncoder(fxgraft.compile(case.program(), backend="torch", check=False))
    with pytest.raises(InputError, match="'pixel_attention_mask'"):
        encoder.of_prompt(tokens, given)
    found = encoder.of_prompt(tokens, case.images)
    assert found is not None
    assert found.features.values.shape == (8, 32)


@pytest.mark.parametrize("given", [pixels(1), {}])
def test_a_text_model_refuses_images(given: Images) -> None:
    engine = text_engine("llama")
    with pytest.raises(InputError, match="writes no images over its tokens"):
        engine.submit([5, 6], greedy(), images=given)
    assert not engine.step()


def test_an_encoder_that_fails_costs_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    encode = images.encode

    def fails(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(images, "encode", fails)
    with pytest.raises(Error, match="out of memory while encoding the images"):
        engine.submit(prompt_of("tItt"), greedy(), images=pixels(1))
    assert not engine.step()
    monkeypatch.setattr(images, "encode", encode)
    assert ask(engine, prompt_of("tItt"), pixels(1)).tokens


def test_pixels_that_are_not_finite_end_their_request_alone() -> None:
    engine = engine_of()
    bad = engine.submit(
        prompt_of("tItt"), greedy(), images={"pixel_values": torch.full((1, 3, 32, 32), torch.nan)}
    )
    good = engine.submit(prompt_of("tItt"), greedy(), images=pixels(1))
    run(engine)
    assert bad.finish_reason == "error"
    assert good.tokens == alone(prompt_of("tItt"), pixels(1), greedy())
    assert_nothing_held(engine)


def test_an_answer_makes_no_rows_of_images_anew() -> None:
    """What a step takes in beside tokens keeps its place, so that it may be captured."""
    engine = engine_of(positions=True)
    addresses: set[int] = set()
    model: Any = engine.model

    def spy(rows: Any, chosen: Tensor) -> Tensor:
        addresses.add(rows.inputs[images.EMBEDS].data_ptr())
        assert not rows.inputs[images.EMBEDS].any()
        return type(model).decode(model, rows, chosen)

    model.decode = spy
    ask(engine, prompt_of("tItt"), pixels(1))
    assert len(addresses) == 1
    assert images.EMBEDS not in text_engine("llama").batch.inputs
