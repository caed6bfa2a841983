"""Servers for tests over the real engine and a tiny random Llama."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import FastAPI

import fxgraft
from fxgraft.runtime.serve.options import ServeOptions
from fxgraft.runtime.serve.startup import app_of
from tests.core._generation import byte_level_tokenizer, tiny_llama
from tests.runtime.serve._app import TEMPLATE

TOKEN_BYTES = 768
"""Of 3 layers: keys and values of 2 heads of 16, float32."""


@cache
def compiled() -> fxgraft.Compiled:
    """The model, its context 64 tokens."""
    return fxgraft.compile(tiny_llama(), ["optimize"], backend="torch")


def real_app(keys: tuple[str, ...] = (), **options: Any) -> FastAPI:
    """A server of the model ``tiny``; 4 requests at once, memory for about 8 whole contexts."""
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE
    values = {"max_batch": 4, "memory_bytes": TOKEN_BYTES * 64 * 8, **options}
    limits = ServeOptions.model_validate(values)
    return app_of(compiled(), tokenizer, name="tiny", options=limits, keys=keys)
