"""From a compiled model to pools on its device; checks of what users ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fxgraft.backend import Compiled
from fxgraft.collectives import smallest
from fxgraft.errors import InputError
from fxgraft.generation.options import SamplingOptions
from fxgraft.paged_model import PagedModel
from fxgraft.paging import PagedProgram, page_state
from fxgraft.program import Input
from fxgraft.runtime.engine.memory import StateMemory, block_counts
from fxgraft.runtime.engine.options import EngineOptions
from fxgraft.state import insert_state
from fxgraft.stepping import check_steps

_CPU_BYTES = 2**30
_GPU_SHARE = 0.9
_UNKNOWN_CONTEXT = 4096


@dataclass(frozen=True)
class Built:
    """A model with its pools, and who holds what of them."""

    model: PagedModel
    memory: StateMemory
    max_context: int


def build_model(compiled: Compiled, options: EngineOptions, context_length: int | None) -> Built:
    """Page a model's state, lower it and allocate the pools.

    Raises:
        StateError: the model cannot generate with explicit state.
        LoweringError: the backend cannot run paged graphs.
        InputError: the memory is too little for one request, or ``max_context`` is over the
            model's.
    """
    step = insert_state(compiled.language_model)
    check_steps(compiled.language_model, step)
    paged = page_state(step, block_size=options.block_size)
    run = compiled.lower_pages(paged)
    context = _context(options, context_length)
    snapshots = options.snapshots if options.prefix_reuse and paged.slot_pools else 0
    slots = options.max_batch + snapshots + 1
    slot_bytes = sum(pool.item_bytes for pool in paged.slot_pools) * slots
    counts = block_counts(paged, _memory(paged, options) - slot_bytes, context)
    return Built(
        PagedModel(paged, run, blocks=counts, slots=slots),
        StateMemory(paged, counts, slots=options.max_batch, snapshots=snapshots),
        context,
    )


def _context(options: EngineOptions, context_length: int | None) -> int:
    if options.max_context is None:
        return context_length or _UNKNOWN_CONTEXT
    if context_length is not None and options.max_context > context_length:
        raise InputError(
            f"engine option max_context={options.max_context} is over the model's context of "
            f"{context_length}",
            f"set max_context to at most {context_length}",
        )
    return options.max_context


def _memory(paged: PagedProgram, options: EngineOptions) -> int:
    if options.memory_bytes is not None:
        return options.memory_bytes
    if paged.program.device.type != "cuda":
        return _CPU_BYTES
    free, _ = torch.cuda.mem_get_info(paged.program.device)
    return smallest(paged.program, int(free * _GPU_SHARE))


@dataclass(frozen=True)
class Limits:
    """What an engine can serve.

    Attributes:
        vocab_size: of the model.
        max_context: most tokens of prompt and answer together.
        paged: describes the inputs.
    """

    vocab_size: int
    max_context: int
    paged: PagedProgram

    def check(self, prompt: Sequence[int], sampling: SamplingOptions) -> None:
        """Refuse a request that can never be served.

        Raises:
            InputError: names what is wrong and what is allowed.
        """
        if not prompt:
            raise InputError("the prompt is empty", "give at least one token")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.vocab_size:
            raise InputError(
                f"token id {low if low < 0 else high} is outside the vocabulary of "
                f"{self.vocab_size}",
                "use the tokenizer that belongs to this model",
            )
        if len(prompt) + sampling.max_new_tokens > self.max_context:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, with "
                f"max_new_tokens={sampling.max_new_tokens} that is over the context of "
                f"{self.max_context}",
                "shorten the prompt or ask for fewer tokens",
            )

    def values(self, given: Mapping[str, float | str]) -> dict[str, float]:
        """What a request sets, as numbers.

        Args:
            given: by name of the input, a number, or the name of one of the input's values.

        Raises:
            InputError: there is no such input, or it does not take that value.
        """
        known = {
            spec.name: spec
            for spec in self.paged.request_inputs
            if spec.name not in self.paged.choices
        }
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise InputError(
                f"this model has no per-request input {unknown[0]!r}",
                f"it has: {', '.join(sorted(known)) or 'none'}",
            )
        return {name: _number(known[name], value) for name, value in given.items()}


def _number(spec: Input, value: float | str) -> float:
    if isinstance(value, str):
        if value in spec.names:
            return spec.names.index(value)
        known = f"one of: {', '.join(spec.names)}" if spec.names else "a number"
        raise InputError(f"per-request input {spec.name!r} is {value!r}", f"give {known}")
    if not math.isfinite(value):
        raise InputError(f"per-request input {spec.name!r} is {value}", "give a finite number")
    if spec.high and not (value == int(value) and 0 <= value < spec.high):
        raise InputError(
            f"per-request input {spec.name!r} is {value}",
            f"give a whole number from 0 to {spec.high - 1}"
            + (f", or one of: {', '.join(spec.names)}" if spec.names else ""),
        )
    return value
