"""Servers for tests, over an engine without a model."""

from __future__ import annotations

from typing import Any, cast

from fastapi import FastAPI

from fxgraft.runtime.serve.app import create_app
from fxgraft.runtime.serve.model import ServedModel
from fxgraft.runtime.serve.options import ServeOptions
from fxgraft.runtime.serve.service import Service
from tests.core._generation import byte_level_tokenizer
from tests.runtime.serve._fake_engine import CONTEXT, FakeEngine

MODEL = ServedModel(
    "tiny", backend="none", context_length=CONTEXT, layers=("attention", "none", "attention"),
    op_layers=(0, 2),
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokens_of(text: str) -> list[int]:
    """Token ids of a text."""
    return cast("list[int]", byte_level_tokenizer()(text)["input_ids"])


def text_of(tokens: Any) -> str:
    """The text of token ids."""
    return str(byte_level_tokenizer().decode(tokens))


def saying(text: str, *, eos: bool = False, **options: Any) -> FakeEngine:
    """An engine that answers every prompt with a text, again and again or with an end."""
    end = byte_level_tokenizer().eos_token_id
    answer = [*tokens_of(text), end] if eos else tokens_of(text)
    return FakeEngine(answer=lambda request: answer, eos=(end,), **options)


def app_of(
    engine: FakeEngine, template: str | None = TEMPLATE, keys: tuple[str, ...] = (), **options: Any
) -> FastAPI:
    """A server over it."""
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    limits = ServeOptions.model_validate({"max_batch": engine.max_batch, **options})
    return create_app(cast(Any, engine), tokenizer, MODEL, limits, keys)


def service_of(app: FastAPI) -> Service:
    """What answers its requests."""
    return app.state.service


def completion(prompt: Any = "the quick fox", **fields: Any) -> dict[str, Any]:
    """The body of a completion request."""
    return {"model": "tiny", "prompt": prompt, "temperature": 0, **fields}


def chat(*contents: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    messages = [{"role": "user", "content": content} for content in contents or ("hi",)]
    return {"model": "tiny", "messages": messages, "temperature": 0, **fields}
