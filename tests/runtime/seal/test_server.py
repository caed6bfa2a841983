"""SEAL in the server: a field of OpenAI's request names the vector and the strength."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

import fxgraft
from fxgraft.passes.seal import Seal
from fxgraft.runtime.serve.options import ServeOptions
from fxgraft.runtime.serve.startup import app_of
from tests import model_folder
from tests.core._generation import byte_level_tokenizer, tiny_llama
from tests.runtime.serve._app import TEMPLATE, chat, completion
from tests.runtime.serve._client import in_loop, running

PROMPT = "<think>\n\nthe quick"


@cache
def folder() -> Path:
    """A tokenizer and two vectors."""
    made = Path(mkdtemp())
    byte_level_tokenizer().save_pretrained(made)
    for seed, name in enumerate(("math", "code")):
        vector = torch.randn(model_folder.HIDDEN, generator=torch.Generator().manual_seed(seed))
        model_folder.write_vector(made / name, vector=vector)
    return made


def app(**fields: Any) -> Any:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE
    vectors = {name: folder() / name for name in ("math", "code")}
    seal = Seal(vectors=vectors, tokenizer=str(folder()), **fields)
    compiled = fxgraft.compile(tiny_llama(), ["optimize", seal], backend="torch")
    options = ServeOptions.model_validate({"max_batch": 4, "memory_bytes": 2**20})
    return app_of(compiled, tokenizer, name="tiny", options=options)


def answer_of(name: str, coefficient: float) -> str:
    """What ``generate`` answers with that vector for all."""
    seal = Seal(vector=folder() / name, tokenizer=str(folder()), coefficient=coefficient)
    compiled = fxgraft.compile(tiny_llama(), ["optimize", seal], backend="torch")
    ids = byte_level_tokenizer()(PROMPT)["input_ids"]
    result = compiled.generate([ids], max_new_tokens=12, eos_token_id=[])
    return byte_level_tokenizer().decode(result[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_a_request_names_vector_and_strength(stream: bool) -> None:
    async with running(app()) as client:

        async def text(**inputs: Any) -> str:
            body = completion(PROMPT, max_tokens=12, ignore_eos=True, stream=stream, inputs=inputs)
            answer = await client.post("/v1/completions", body)
            assert answer.status == 200, answer
            if not stream:
                return answer.json["choices"][0]["text"]
            return "".join(event["choices"][0]["text"] for event in answer.events)

        assert await text(seal_vector="math", seal_strength=8) == answer_of("math", 8.0)
        assert await text(seal_vector="code", seal_strength=-8) == answer_of("code", -8.0)
        plain = await text()
        assert await text(seal_vector="none", seal_strength=8) == plain
        assert await text(seal_vector="math", seal_strength=0) == plain
        assert len({plain, answer_of("math", 8.0), answer_of("code", -8.0)}) == 3


@in_loop
async def test_wrong_names_are_refused_by_name() -> None:
    async with running(app()) as client:
        for inputs, words in (
            ({"seal_vector": "physics"}, "one of: none, math, code"),
            ({"seal_vector": 3}, "from 0 to 2"),
            ({"seal_strength": "strong"}, "a number"),
        ):
            answer = await client.post("/v1/chat/completions", chat(PROMPT, inputs=inputs))
            assert answer.status == 400
            assert words in answer.json["error"]["message"]
