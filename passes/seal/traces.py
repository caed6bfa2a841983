"""Traces: prompts and what a model answered to them, read from files or generated."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from fxgraft.errors import InputError
from fxgraft.generation import generate
from fxgraft.generation.prompts import integers
from fxgraft.program import Program
from fxgraft.state import insert_state
from fxgraft.stepping import StateModel

_REMEDY = (
    "write one JSON object per line: 'prompt_ids' and 'response_ids', or 'prompt' (as the model "
    "sees it) or 'question' (put into the chat template), each with 'response', or without it to "
    "have the model answer"
)


@dataclass(frozen=True)
class Trace:
    """A prompt and an answer.

    Attributes:
        prompt: token ids.
        response: token ids; None: the model is to answer.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...] | None

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return (*self.prompt, *(self.response or ()))


def read(paths: Sequence[Path], tokenizer: Any, instruction: str) -> list[Trace]:
    """Read traces from JSONL files.

    Args:
        paths: the files.
        tokenizer: of transformers.
        instruction: put behind each question.

    Raises:
        InputError: a file cannot be read or a line is no trace; names file and line.
    """
    found = [trace for path in paths for trace in _read(path, tokenizer, instruction)]
    if not found:
        raise InputError(
            f"there are no traces in {', '.join(map(str, paths)) or 'no file'}", _REMEDY
        )
    return found


def _read(path: Path, tokenizer: Any, instruction: str) -> Iterator[Trace]:
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", "give a JSONL file") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _parse(line, f"{path}:{number}", tokenizer, instruction)


def _parse(line: str, place: str, tokenizer: Any, instruction: str) -> Trace:
    try:
        record = cast("object", json.loads(line))
    except ValueError as error:
        raise InputError(f"{place} is no JSON: {error}", _REMEDY) from error
    if not isinstance(record, dict):
        raise InputError(f"{place} is no JSON object", _REMEDY)
    fields = cast("dict[str, object]", record)
    ids = [fields.get("prompt_ids"), fields.get("response_ids")]
    if all(_is_ids(one) for one in ids):
        return Trace(*(tuple(cast("list[int]", one)) for one in ids))
    prompt, question, response = (fields.get(k) for k in ("prompt", "question", "response"))
    if not isinstance(response, str | None) or not isinstance(prompt or question, str):
        raise InputError(f"{place} is no trace: its fields are {', '.join(fields)}", _REMEDY)
    start = (
        _encode(tokenizer, prompt)
        if isinstance(prompt, str)
        else ask(tokenizer, f"{question}\n{instruction}".strip())
    )
    if not start:
        raise InputError(f"{place} has an empty prompt", _REMEDY)
    answer = None if response is None else _encode(tokenizer, response, add_special_tokens=False)
    return Trace(start, answer)


def _is_ids(value: object) -> bool:
    items = cast("list[object]", value) if isinstance(value, list) else []
    return bool(items) and all(type(item) is int for item in items)


def _encode(tokenizer: Any, text: str, **options: Any) -> tuple[int, ...]:
    return tuple(cast("list[int]", tokenizer(text, **options)["input_ids"]))


def ask(tokenizer: Any, question: str) -> tuple[int, ...]:
    """Token ids of a question in the tokenizer's chat template; without one, as it is."""
    if not getattr(tokenizer, "chat_template", None):
        return _encode(tokenizer, question)
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
    )
    return tuple(cast("list[int]", encoded["input_ids"]))


def answered(program: Program, traces: Sequence[Trace], max_new_tokens: int) -> list[Trace]:
    """Traces in which the model has answered greedily where there was no answer.

    Args:
        program: the model.
        traces: some of them without an answer.
        max_new_tokens: most tokens of an answer.

    Raises:
        StateError: the model cannot generate with explicit state.
        InputError: a prompt is too long.
    """
    open_places = [n for n, trace in enumerate(traces) if trace.response is None]
    if not open_places:
        return list(traces)
    step = insert_state(program)
    model = StateModel(step, lambda values: step.program.graph_module(*values))
    prompts = [list(traces[place].prompt) for place in open_places]
    with torch.no_grad():
        result = generate(model, prompts, max_new_tokens=max_new_tokens, return_dict=True)
    found = list(traces)
    for place, tokens in zip(open_places, result.new_tokens, strict=True):
        found[place] = Trace(traces[place].prompt, tuple(integers(tokens)))
    return found
