"""A request's fields as options of generation."""

from __future__ import annotations

import hashlib
from typing import Any

from fxgraft.generation import SamplingOptions
from fxgraft.runtime.serve.schema import Generation

_SEEDS = 2**63


def sampling_of(request: Generation, max_new_tokens: int) -> SamplingOptions:
    """Options of the first choice.

    ``temperature`` is 1 as OpenAI's, and 0 means greedy.

    Raises:
        InputError: ``min_tokens`` is over the limit.
    """
    greedy = request.temperature == 0
    values: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": request.min_tokens,
        "do_sample": not greedy,
        "temperature": None if greedy else request.temperature,
        # vLLM writes "all" as -1.
        "top_k": None if request.top_k is None else max(request.top_k, 0),
        "top_p": request.top_p,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "eos_token_id": () if request.ignore_eos else None,
        "stop_strings": request.stops,
        "seed": None if request.seed is None else request.seed % _SEEDS,
    }
    return SamplingOptions.checked(**values)


def of_choice(options: SamplingOptions, choice: int) -> SamplingOptions:
    """Options of a further choice: with a seed, it draws from random numbers of its own."""
    if options.seed is None or choice == 0:
        return options
    digest = hashlib.blake2b(f"{options.seed}/{choice}".encode(), digest_size=8).digest()
    return options.model_copy(update={"seed": int.from_bytes(digest, "big") % _SEEDS})
