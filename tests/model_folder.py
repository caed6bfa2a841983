"""A tiny Llama in a folder of its own, as one finds on the hub: weights, config, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import PreTrainedTokenizerFast

from fxgraft.passes.seal import SteeringVector
from tests import models

HIDDEN, LAYERS, VOCABULARY, CONTEXT = 64, 2, 300, 96
TEXT = "a\n\n<think>one\n\ntwo\n\nthree</think>four\n\nfive"
"""A text in which ``seal`` fires twice."""


def llama(**changes: Any) -> nn.Module:
    """The model, with as many tokens as the tokenizer has."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    return models.llama(**{**sizes, "num_hidden_layers": LAYERS, **changes})


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer that knows a double newline and one tag as single tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate(alphabet)}
    vocabulary["ĊĊ"] = len(vocabulary)
    tokenizer: Any = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</think>", special=True)])
    cast(Any, PreTrainedTokenizerFast)(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def write(folder: Path, model: nn.Module | None = None, **options: Any) -> Path:
    """Write the model (or another one) and the tokenizer to a folder.

    Args:
        folder: to write to.
        model: instead of ``llama()``.
        options: of ``save_pretrained``.
    """
    cast(Any, model or llama()).save_pretrained(folder, **options)
    return write_tokenizer(folder)


def write_vector(path: Path, **changes: Any) -> Path:
    """A steering vector for the model."""
    values: dict[str, Any] = {
        "vector": torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3)),
        "convention": "E-RT", "layer": 1, "model": "", **changes,
    }  # fmt: skip
    return SteeringVector(**values).save(path)


def tokens_of(folder: Path, text: str) -> list[int]:
    """Token ids of a text."""
    tokenizer = cast(Any, PreTrainedTokenizerFast).from_pretrained(folder)
    return cast("list[int]", tokenizer(text)["input_ids"])
