"""A small reasoner with known thoughts, trained on synthetic sums, for ``seal_reasoner.py``.

A question is a list of digits; the chain adds them up modulo 10, one paragraph per sum. After a sum
that carries, the training chains check themselves with probability 0.85 ("Wait, 7+5=2") and then
often take another order ("Alternatively, 5+7=2"); after other sums seldom. None of that changes the
answer, so every reflection and transition is redundant, and its kind is known.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

START, END, STOP = "<think>", "</think>", "<stop>"
_WORDS = (START, END, "Wait,", "Alternatively,")
_TERMS = (3, 4)
_AFTER_CARRY, _AFTER_SUM, _OTHER_ORDER, _ONCE_MORE = 0.85, 0.1, 0.6, 0.3
_ALPHABET = "0123456789+= \nA:"


def question(generator: random.Random) -> list[int]:
    """Digits to add up."""
    return [generator.randrange(10) for _ in range(generator.randint(*_TERMS))]


def prompt_of(digits: Sequence[int]) -> str:
    """The question, with the thinking section open."""
    return f"{' '.join(map(str, digits))}\n{START}\n\n"


def answer_of(digits: Sequence[int]) -> int:
    """The right answer."""
    return sum(digits) % 10


def chain(digits: Sequence[int], generator: random.Random) -> str:
    """A chain of thought with redundant paragraphs, and the answer."""
    paragraphs: list[str] = []
    total = digits[0]
    for digit in digits[1:]:
        carries = total + digit >= 10
        result = (total + digit) % 10
        paragraphs.append(f"{total}+{digit}={result}")
        checks = generator.random() < (_AFTER_CARRY if carries else _AFTER_SUM)
        while checks:
            paragraphs.append(f"Wait, {total}+{digit}={result}")
            if generator.random() > _OTHER_ORDER:
                break
            paragraphs.append(f"Alternatively, {digit}+{total}={result}")
            checks = generator.random() < _ONCE_MORE
        total = result
    body = "\n\n".join(paragraphs)
    return f"{body}\n{END}A:{total}{STOP}"


def redundant(text: str) -> tuple[int, int]:
    """Numbers of redundant and of all paragraphs in a chain."""
    inside = text.partition(END)[0]
    paragraphs = [part.strip() for part in inside.split("\n\n") if part.strip()]
    return sum(part.startswith(("Wait", "Alternatively")) for part in paragraphs), len(paragraphs)


def given_answer(text: str) -> int | None:
    """The answer in a text, None if there is none."""
    found = re.search(rf"{END}A:(\d)", text)
    return int(found[1]) if found else None


def tokenizer() -> Any:
    """Characters, and a token for each tag and word; a paragraph break is two tokens."""
    byte_of = {" ": "Ġ", "\n": "Ċ"}
    characters = [byte_of.get(char, char) for char in _ALPHABET]
    vocabulary = {char: index for index, char in enumerate(sorted(characters))}
    built: Any = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_tokens([AddedToken(word, special=False) for word in _WORDS])
    built.add_special_tokens([AddedToken(STOP, special=True)])
    return cast(Any, PreTrainedTokenizerFast)(tokenizer_object=built, eos_token=STOP)


def model(vocabulary: int, stop: int, width: int = 64, layers: int = 4) -> Any:
    """A Llama of four small blocks, random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=512, eos_token_id=stop, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return cast(Any, LlamaForCausalLM)(config)


def train(
    folder: Path, *, minutes: float = 8.0, batch: int = 24, seed: int = 0
) -> dict[str, float]:
    """Train on fresh chains and write model and tokenizer to a folder.

    Args:
        folder: for the model.
        minutes: of wall time.
        batch: chains per step.
        seed: of the chains.

    Returns:
        Steps, the last loss per answer token, seconds.
    """
    words = tokenizer()
    reasoner = model(len(words), words.convert_tokens_to_ids(STOP))
    optimizer = torch.optim.AdamW(reasoner.parameters(), lr=4e-3, weight_decay=0.01)
    generator, begun = random.Random(seed), time.monotonic()
    steps, smooth = 0, 0.0
    while (share := (time.monotonic() - begun) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (steps + 1) / 50) * max(1 - share, 0.02)
        ids, targets = _batch(words, generator, batch)
        logits = reasoner(input_ids=ids).logits
        loss = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reasoner.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if not steps else 0.98 * smooth + 0.02 * loss.item()
        steps += 1
        if steps % 50 == 0:
            print(f"step {steps}: loss {smooth:.4f}, {time.monotonic() - begun:.0f} s", flush=True)
    reasoner.eval().save_pretrained(folder)
    words.save_pretrained(folder)
    found = {"steps": float(steps), "loss": smooth, "seconds": time.monotonic() - begun}
    (folder / "training.json").write_text(json.dumps(found))
    return found


def _batch(words: Any, generator: random.Random, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows: list[tuple[list[int], int]] = []
    for _ in range(size):
        digits = question(generator)
        start = words(prompt_of(digits))["input_ids"]
        rows.append((start + words(chain(digits, generator))["input_ids"], len(start)))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(size, longest, dtype=torch.int64)
    targets = torch.full((size, longest), -100)
    for row, (tokens, start) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        targets[row, start : len(tokens)] = torch.tensor(tokens[start:])
    return ids, targets
