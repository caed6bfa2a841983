"""``generate``: prefill, then one token per row and step until every row has ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from fxgraft.errors import Error, InputError
from fxgraft.generation.options import SamplingKeywords, SamplingOptions
from fxgraft.generation.processors import History
from fxgraft.generation.prompts import Prompt, TokenIds, integers, prepare_prompt
from fxgraft.generation.sampling import row_generators, sample
from fxgraft.generation.step import GreedyStepModel, StepModel
from fxgraft.generation.stopping import StopStringMatcher
from fxgraft.generation.text import Vocabulary
from fxgraft.generation.unread import UnreadTokens

FinishReason = Literal["eos", "stop_string", "callback", "length"]
Callback = Callable[[Tensor, Tensor], "bool | Sequence[bool] | Tensor | None"]


@dataclass(frozen=True)
class GenerationOutput:
    """What ``generate`` returns with ``return_dict=True``.

    Attributes:
        sequences: int64 [B, S + N]: prompts, new tokens, then padding.
        prompt_length: S.
        lengths: number of new tokens of each row, the one that ended it included.
        finish_reasons: why each row ended.
    """

    sequences: Tensor
    prompt_length: int
    lengths: tuple[int, ...]
    finish_reasons: tuple[FinishReason, ...]

    @property
    def new_tokens(self) -> list[Tensor]:
        """The new tokens of each row without padding."""
        start = self.prompt_length
        return [
            row[start : start + length]
            for row, length in zip(self.sequences, self.lengths, strict=True)
        ]


@overload
def generate(
    model: StepModel,
    input_ids: TokenIds,
    attention_mask: Tensor | None = None,
    *,
    pad_token_id: int | None = None,
    tokenizer: Any = None,
    on_token: Callback | None = None,
    return_dict: Literal[False] = False,
    **options: Unpack[SamplingKeywords],
) -> Tensor:
    """Prompts and answers, int64 [B, S + new]."""


@overload
def generate(
    model: StepModel,
    input_ids: TokenIds,
    attention_mask: Tensor | None = None,
    *,
    pad_token_id: int | None = None,
    tokenizer: Any = None,
    on_token: Callback | None = None,
    return_dict: Literal[True],
    **options: Unpack[SamplingKeywords],
) -> GenerationOutput:
    """The same with lengths and reasons."""


def generate(
    model: StepModel,
    input_ids: TokenIds,
    attention_mask: Tensor | None = None,
    *,
    pad_token_id: int | None = None,
    tokenizer: Any = None,
    on_token: Callback | None = None,
    return_dict: bool = False,
    **options: Unpack[SamplingKeywords],
) -> Tensor | GenerationOutput:
    """Continue prompts, in greedy mode token for token as transformers' ``generate`` does.

    Args:
        model: with explicit state.
        input_ids: int64 [B, S] padded on the left, or [S], or a list of prompts of any length.
        attention_mask: [B, S], 0 at padding. Without one, ``pad_token_id`` is taken for padding
            unless it also ends texts, and all other tokens for text.
        pad_token_id: fills up ended rows; default the model's, else the first
            ``eos_token_id``, else 0.
        tokenizer: of transformers; needed for ``stop_strings``.
        on_token: called after each step with the new tokens int64 [B] (padding in rows that had
            ended before) and bool [B], which rows have ended. Returning True ends generation,
            returning a bool per row ends those rows.
        return_dict: return a ``GenerationOutput``.
        options: fields of ``SamplingOptions``: ``max_new_tokens`` (128), ``min_new_tokens``,
            ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p``,
            ``repetition_penalty`` (on tokens of prompt and answer), ``eos_token_id`` (an id or
            several; default the model's, ``[]`` for none), ``stop_strings`` (one or several; a
            row ends with the token that completes one) and ``seed`` (a prompt draws alike alone
            and in any batch, copies of a prompt in one batch differ; default: torch's global
            random state).

    Returns:
        int64 [B, S + N] with N at most ``max_new_tokens``, or a ``GenerationOutput``.

    Raises:
        InputError: an option is out of range, a prompt is empty, padded on the right, or too
            long for the model together with ``max_new_tokens``.
        Error: the model returned logits that are not finite; names the step.
    """
    chosen = SamplingOptions.checked(**options)
    if chosen.eos_token_id is None:
        chosen = chosen.model_copy(update={"eos_token_id": model.eos_token_ids})
    eos = chosen.eos_token_id or ()
    known_pad = _padding(model, pad_token_id)
    pad = known_pad if known_pad is not None else eos[0] if eos else 0
    prompt = prepare_prompt(
        input_ids,
        attention_mask,
        pad_token_id=pad,
        vocab_size=model.vocab_size,
        infer_mask=known_pad is not None and known_pad not in eos,
    )
    _check_context(model.context_length, prompt, chosen.max_new_tokens)
    batch = _Batch(model, prompt, chosen, pad, _matchers(chosen, prompt, tokenizer))
    with torch.no_grad():
        batch.run(on_token)
    return batch.output() if return_dict else batch.output().sequences


def _padding(model: StepModel, given: int | None) -> int | None:
    valid = range(model.vocab_size)
    if given is not None and given not in valid:
        raise InputError(
            f"option pad_token_id={given} is outside the vocabulary of {model.vocab_size}",
            "give a token id of this model, for example its end-of-text token",
        )
    # Some configurations say -1, or an id that was never added to the embedding.
    return model.pad_token_id if given is None and model.pad_token_id in valid else given


def _check_context(limit: int | None, prompt: Prompt, max_new_tokens: int) -> None:
    longest = max(prompt.lengths)
    if limit is None or longest + max_new_tokens <= limit:
        return
    row = prompt.lengths.index(longest)
    if longest >= limit:
        raise InputError(
            f"prompt {row} has {longest} tokens, the model's context holds {limit} with the answer",
            f"shorten the prompt by at least {longest - limit + 1} tokens",
        )
    raise InputError(
        f"prompt {row} has {longest} tokens, with max_new_tokens={max_new_tokens} that is over "
        f"the model's context of {limit}",
        f"set max_new_tokens to at most {limit - longest}, or shorten the prompt",
    )


def _matchers(
    options: SamplingOptions, prompt: Prompt, tokenizer: Any
) -> list[StopStringMatcher] | None:
    if not options.stop_strings:
        return None
    if tokenizer is None:
        raise InputError("stop_strings are given without a tokenizer", "pass tokenizer=...")
    vocabulary = Vocabulary(tokenizer)
    return [
        StopStringMatcher(options.stop_strings, vocabulary, integers(row)) for row in prompt.rows
    ]


class _Batch:
    """The rows of one call, and the state of the model for those still in it."""

    def __init__(
        self,
        model: StepModel,
        prompt: Prompt,
        options: SamplingOptions,
        pad_token_id: int,
        matchers: list[StopStringMatcher] | None,
    ) -> None:
        batch, self.width = prompt.input_ids.shape
        shape, device = (batch, self.width + options.max_new_tokens), prompt.input_ids.device
        self.model, self.prompt, self.options = model, prompt, options
        self.pad, self.matchers = pad_token_id, matchers
        self.sequences = torch.full(shape, pad_token_id, dtype=torch.int64, device=device)
        self.sequences[:, : self.width] = prompt.input_ids
        self.mask = torch.ones(shape, dtype=torch.int64, device=device)
        self.mask[:, : self.width] = prompt.attention_mask
        self.starts, self.prompt_lengths = prompt.starts, prompt.lengths
        self.generators: Sequence[torch.Generator | None] = (
            row_generators(options.seed, prompt.rows) if options.do_sample else [None] * batch
        )
        self.count = 0
        self.lengths = [0] * batch
        self.reasons: list[FinishReason | None] = [None] * batch
        # The rows that the model's state holds; ended ones stay until half of them are.
        self.held = list(range(batch))
        self.state: Any = model.empty_state(batch)

    @property
    def live(self) -> list[int]:
        """Rows that have not ended."""
        return [row for row, reason in enumerate(self.reasons) if reason is None]

    def run(self, on_token: Callback | None) -> None:
        """Generate until every row has ended."""
        logits = self._prefill()
        if (
            isinstance(self.model, GreedyStepModel)
            and self.options.is_plain_greedy
            and on_token is None
            and self.matchers is None
        ):
            self._run_ahead(self.model, self._choose(logits))
            return
        while True:
            tokens = self._choose(logits)
            if on_token is not None:
                self._consult(on_token, tokens)
            if not self.live:
                return
            logits = self._decode(tokens)

    def _run_ahead(self, model: GreedyStepModel, tokens: Tensor) -> None:
        """Launch each step before the tokens of the one before it are read."""
        given: Tensor | None = tokens
        unread: deque[UnreadTokens] = deque()
        while self.live:
            if self._many_ended() and not unread:
                self._drop_ended_rows()
                given = self.sequences[:, self.width + self.count - 1]
            is_last = self.count + len(unread) == self.options.max_new_tokens
            if not (is_last or self._many_ended()):
                first = None if given is None else given[self._index(self.held)]
                launched, self.state = model.step_greedy(first, self.state)
                unread.append(launched)
                given = None
                if len(unread) == 1:
                    continue
            self._take(unread.popleft().read())

    def _take(self, chosen: Sequence[int]) -> None:
        """Store and judge the tokens of the rows that are held."""
        tokens = [self.pad] * len(self.reasons)
        live = set(self.live)
        for row, token in zip(self.held, chosen, strict=True):
            if row in live:
                if token < 0:
                    raise self._not_finite(row)
                tokens[row] = token
        self.sequences[:, self.width + self.count] = self._index(tokens)
        self.count += 1
        for row in sorted(live):
            self.lengths[row] += 1
            self.reasons[row] = self._judge(row, tokens[row])

    def output(self) -> GenerationOutput:
        """The sequences up to the longest row's end."""
        return GenerationOutput(
            self.sequences[:, : self.width + self.count],
            self.width,
            tuple(self.lengths),
            tuple(reason or "length" for reason in self.reasons),
        )

    def _prefill(self) -> Tensor:
        prompt = self.prompt
        logits, self.state = self.model.step(
            prompt.input_ids, prompt.attention_mask, prompt.position_ids, self.state
        )
        return logits

    def _decode(self, tokens: Tensor) -> Tensor:
        if self._many_ended():
            self._drop_ended_rows()
        held = self._index(self.held)
        positions = [self.prompt_lengths[row] + self.count - 1 for row in self.held]
        logits, self.state = self.model.step(
            tokens[held][:, None],
            self.mask[held, : self.width + self.count],
            self._index(positions)[:, None],
            self.state,
        )
        return logits

    def _many_ended(self) -> bool:
        return 2 * len(self.live) <= len(self.held)

    def _drop_ended_rows(self) -> None:
        live = self.live
        self.state = self.model.select(self.state, self._index(self._live_places()))
        self.held = live

    def _live_places(self) -> list[int]:
        return [place for place, row in enumerate(self.held) if self.reasons[row] is None]

    def _choose(self, logits: Tensor) -> Tensor:
        """Choose, store and judge one token per live row; int64 [B], padding in ended rows."""
        live = self.live
        if len(live) < len(self.held):
            logits = logits[self._index(self._live_places())]
        self._check_finite(logits, live)
        chosen = sample(
            logits,
            [self.options] * len(live),
            [self._history(row) for row in live],
            [self.generators[row] for row in live],
        )
        tokens = torch.full_like(self.sequences[:, 0], self.pad)
        tokens[self._index(live)] = chosen.to(tokens.device)
        self.sequences[:, self.width + self.count] = tokens
        self.count += 1
        for row, token in zip(live, integers(chosen), strict=True):
            self.lengths[row] += 1
            self.reasons[row] = self._judge(row, token)
        return tokens

    def _judge(self, row: int, token: int) -> FinishReason | None:
        stopped = self.matchers is not None and self.matchers[row].push(token)
        if token in (self.options.eos_token_id or ()):
            return "eos"
        if stopped:
            return "stop_string"
        return "length" if self.lengths[row] == self.options.max_new_tokens else None

    def _consult(self, on_token: Callback, tokens: Tensor) -> None:
        ended = torch.tensor([reason is not None for reason in self.reasons])
        answer = on_token(tokens, ended)
        if answer is None:
            return
        rows = [answer] * len(ended) if isinstance(answer, bool) else answer
        for row, stop in enumerate(rows):
            if stop and self.reasons[row] is None:
                self.reasons[row] = "callback"

    def _history(self, row: int) -> History:
        end = self.width + self.count
        start = self.starts[row]
        return History(self.sequences[row, start:end], self.width - start)

    def _check_finite(self, logits: Tensor, rows: Sequence[int]) -> None:
        # The maximum is finite unless there is a NaN, an inf, or nothing but -inf.
        finite = integers(torch.isfinite(logits.amax(dim=-1)))
        if not all(finite):
            raise self._not_finite(rows[finite.index(0)])

    def _not_finite(self, row: int) -> Error:
        return Error(
            f"the logits of row {row} are not finite at generation step {self.count} "
            f"(new token {self.count + 1})",
            "check the weights for NaN, and use float32 or bfloat16 if the model runs in float16",
        )

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.sequences.device)
