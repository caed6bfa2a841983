"""``spin`` in the engine: chunks and shared prefixes change nothing in what is gated."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import fxgraft
from fxgraft.generation import SamplingOptions
from fxgraft.passes.spin import Spin
from fxgraft.runtime.engine import Engine, EngineOptions, Request
from tests import models
from tests.passes import _vision_models
from tests.passes._vision_models import IMAGE

Images = dict[str, Tensor]


def test_engine_equals_generate() -> None:
    """A prompt longer than a chunk; the second request shares the first one's blocks."""
    program = fxgraft.capture(models.llama(num_hidden_layers=2))
    step = Spin(span=(2, 9), heads=1)
    compiled = fxgraft.compile(program, [step], backend="torch", options={"mode": "eager"})
    ids = (torch.arange(20) * 7 % 110 + 4)[None]
    wanted = compiled.generate(ids, max_new_tokens=8, eos_token_id=[])[0, 20:]
    engine = Engine(compiled, EngineOptions(block_size=4, chunk_tokens=8, max_batch=2))
    sampling = SamplingOptions(max_new_tokens=8, eos_token_id=())
    prompt = [int(token) for token in ids[0]]
    requests = [_answered(engine, prompt, sampling) for _ in range(2)]
    for request in requests:
        assert request.error is None
        assert request.tokens == [int(token) for token in wanted]
    assert requests[1].reused_tokens > 0


def _answered(engine: Engine, prompt: list[int], sampling: SamplingOptions) -> Request:
    request = engine.submit(prompt, sampling)
    while not request.is_finished:
        engine.step()
    return request


@cache
def guided(score: str, rows: str) -> fxgraft.Compiled:
    step = Spin(heads=2, score=cast(Any, score), rows=cast(Any, rows))
    program = _vision_models.llava().program()
    return fxgraft.compile(program, [step], backend="torch", options={"mode": "eager"})


@pytest.mark.parametrize("chunk", [5, 100])
@pytest.mark.parametrize("rows", ["last", "all_text"])
@pytest.mark.parametrize("score", ["logit_sum", "mass"])
def test_images_in_the_engine_are_looked_at_as_in_generate(
    score: str, rows: str, chunk: int
) -> None:
    """Beside texts, in chunks that cut the image, and behind a prefix that was kept."""
    compiled = guided(score, rows)
    engine = Engine(
        compiled,
        EngineOptions(
            block_size=4, chunk_tokens=chunk, max_batch=4, max_context=64, memory_bytes=2**22
        ),
    )
    sampling = SamplingOptions(max_new_tokens=8, eos_token_id=())
    asked: list[tuple[list[int], Images | None]] = [
        ([5, 6, *[IMAGE] * 16, 7, 8, 9], pixels(1)),
        ([5, 6, *[IMAGE] * 16, 7, 8, 9], pixels(2)),
        ([5, 6, 7], None),
        ([5, *[IMAGE] * 16, 9, *[IMAGE] * 16, 7], pixels(3, 4)),
    ]
    requests = [engine.submit(ids, sampling, images=given) for ids, given in asked]
    while engine.step():
        pass
    wanted = [alone(compiled, ids, given) for ids, given in asked]
    assert [request.tokens for request in requests] == wanted
    again = engine.submit(asked[0][0], sampling, images=asked[0][1])
    while engine.step():
        pass
    assert again.tokens == wanted[0]
    assert again.reused_tokens > 0
    plain = fxgraft.compile(
        _vision_models.llava().program(), backend="torch", options={"mode": "eager"}
    )
    assert wanted != [alone(plain, ids, given) for ids, given in asked]


def alone(compiled: fxgraft.Compiled, tokens: list[int], given: Images | None) -> list[int]:
    """What ``generate`` answers."""
    with warnings.catch_warnings():
        # It says that a prompt without images is not changed.
        warnings.simplefilter("ignore")
        result = compiled.generate([tokens], images=given, max_new_tokens=8, eos_token_id=[])
    return result[0, len(tokens) :].tolist()


def pixels(*seeds: int) -> Images:
    """One random image per seed."""
    drawn = [
        torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    return {"pixel_values": torch.stack(drawn)}
