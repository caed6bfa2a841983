"""``spin`` in the engine: chunks and shared prefixes change nothing in what is gated."""

from __future__ import annotations

import torch

import fxgraft
from fxgraft.generation import SamplingOptions
from fxgraft.passes.spin import Spin
from fxgraft.runtime.engine import Engine, EngineOptions, Request
from tests import models


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
