"""Calibration data: inputs of a Program from text or tensor files, and the loss on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fxgraft import sources
from fxgraft.artifact import read_tensors
from fxgraft.errors import InputError
from fxgraft.program import Program

Inputs = dict[str, Tensor]
_TEXT = (".txt", ".md", ".jsonl")
# So many tokens go through a block at once: enough for fast products, little enough for memory.
_TOKENS_AT_ONCE = 2048
_SAMPLES_AT_ONCE = 8


@dataclass(frozen=True)
class Choice:
    """Which inputs to take from the files.

    Attributes:
        samples: number of sequences or samples.
        length: tokens per sequence, for text.
        seed: of the places where sequences are cut.
        tokenizer: model whose tokenizer to use; None for the Program's own source.
    """

    samples: int
    length: int
    seed: int = 0
    tokenizer: str | None = None


def load(program: Program, files: Sequence[Path], choice: Choice) -> list[Inputs]:
    """Batches of inputs from files.

    Text (``.txt``, ``.md``, or ``.jsonl`` with a key ``text``, else all its texts) is tokenised as
    one stream, from which sequences are cut at random. A ``.safetensors`` file has one tensor per
    input, samples first.

    Raises:
        InputError: a file cannot be read, is too short, or does not fit the model.
    """
    if not files:
        raise InputError("no calibration data was given", "name a file: --data text.txt")
    if all(path.suffix == ".safetensors" for path in files):
        return _from_tensors(program, files, choice)
    if "input_ids" not in {spec.name for spec in program.inputs}:
        names = ", ".join(spec.name for spec in program.inputs)
        raise InputError(
            f"the model takes no text, but {names}", "give a .safetensors file of its inputs"
        )
    return from_tokens(tokens_of(program, files, choice.tokenizer), choice)


def tokens_of(program: Program, files: Sequence[Path], tokenizer: str | None = None) -> Tensor:
    """The text of files as one stream of tokens, int64 [S].

    Raises:
        InputError: a file cannot be read, or the tokenizer is not known.
    """
    source = tokenizer or str(program.origin.get("source") or "")
    if not source:
        raise InputError(
            "the model was given as a module, so its tokenizer is not known",
            "set 'tokenizer' to the model's name or folder",
        )
    text = "\n\n".join(read_text(path) for path in files)
    encode = sources.tokenizer(source)
    return torch.tensor(encode(text, add_special_tokens=False, verbose=False)["input_ids"])


def from_tokens(tokens: Tensor, choice: Choice) -> list[Inputs]:
    """Sequences cut at random places from a stream of tokens, in batches.

    Args:
        tokens: int64 [S].
        choice: how many, how long, and the seed.

    Raises:
        InputError: the stream is shorter than one sequence.
    """
    if tokens.numel() < choice.length:
        raise InputError(
            f"the calibration text has {tokens.numel()} tokens, one sequence needs {choice.length}",
            "give more text, or a smaller length",
        )
    generator = torch.Generator().manual_seed(choice.seed)
    places = torch.randint(
        tokens.numel() - choice.length + 1, (choice.samples,), generator=generator
    )
    rows = tokens[places[:, None] + torch.arange(choice.length)]
    at_once = max(_TOKENS_AT_ONCE // choice.length, 1)
    return [{"input_ids": rows[i : i + at_once]} for i in range(0, choice.samples, at_once)]


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        InputError: it cannot be read, or is neither text nor lines of JSON objects.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", "give a text file in UTF-8") from error
    if path.suffix not in _TEXT:
        raise InputError(
            f"{path} is neither text nor tensors", f"give {', '.join(_TEXT)} or .safetensors"
        )
    return text if path.suffix != ".jsonl" else _from_lines(path, text)


def _from_lines(path: Path, text: str) -> str:
    found: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            fields: object = json.loads(line) if line.strip() else {}
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}", "give one object a line") from error
        if not isinstance(fields, dict):
            raise InputError(f"{path}, line {number} holds no object", "give one object a line")
        named = cast("dict[str, Any]", fields)
        texts = [named["text"]] if "text" in named else list(named.values())
        found += [item for item in texts if isinstance(item, str)]
    return "\n\n".join(found)


def _from_tensors(program: Program, files: Sequence[Path], choice: Choice) -> list[Inputs]:
    tensors = {name: value for path in files for name, value in read_tensors(path).items()}
    required = {spec.name for spec in program.inputs if spec.default == "required"}
    unknown = set(tensors) - {spec.name for spec in program.inputs}
    if unknown or required - set(tensors):
        raise InputError(
            f"the calibration tensors are {sorted(tensors)}, the model needs {sorted(required)}",
            "name the tensors like the model's inputs",
        )
    available = min(value.shape[0] for value in tensors.values())
    if available < choice.samples:
        raise InputError(
            f"the calibration tensors hold {available} samples, {choice.samples} are needed",
            "give more data, or fewer samples",
        )
    generator = torch.Generator().manual_seed(choice.seed)
    order = torch.randperm(available, generator=generator)[: choice.samples]
    chosen = {name: value[order] for name, value in tensors.items()}
    return [
        {name: value[i : i + _SAMPLES_AT_ONCE] for name, value in chosen.items()}
        for i in range(0, choice.samples, _SAMPLES_AT_ONCE)
    ]


def to_device(batches: Sequence[Inputs], device: torch.device) -> list[Inputs]:
    """The batches on a device."""
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


def token_losses(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Cross-entropy of each next token, float32 [B, S - 1], in nats.

    Args:
        logits: [B, S, V].
        input_ids: int64 [B, S].
    """
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
    )
    return flat.view(input_ids.shape[0], -1)
