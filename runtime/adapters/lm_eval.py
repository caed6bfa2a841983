"""A compiled model as a model of the lm-evaluation-harness (optional package ``lm-eval``).

>>> lm_eval.simple_evaluate(CompiledLM(compiled, tokenizer), tasks=["arc_easy"])  # doctest: +SKIP

Requests are cut into tokens, truncated and cleaned up as the harness's ``HFLM`` does it, so
scores are comparable.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from fxgraft.errors import InputError
from fxgraft.generation import StopStringMatcher, Vocabulary
from fxgraft.runtime.adapters.compiled import CompiledModel

# Imported by name, because type checkers must not depend on an optional package.
try:
    _api: Any = importlib.import_module("lm_eval.api.model")
    _models: Any = importlib.import_module("lm_eval.models.utils")
    _utils: Any = importlib.import_module("lm_eval.utils")
except ImportError as error:
    raise InputError(
        f"the lm-evaluation-harness cannot be imported: {error}",
        "run: pip install 'fxgraft[eval]'",
    ) from error

_TemplateLM: Any = _api.TemplateLM
_Window = tuple["tuple[str, str] | None", list[int], list[int]]
_DEFAULT_CONTEXT_LENGTH = 2048
_DEFAULT_NEW_TOKENS = 256
_T = TypeVar("_T")


class CompiledLM(_TemplateLM):
    """Answers the harness's requests with a compiled causal language model.

    Args:
        compiled: the model.
        tokenizer: of transformers.
        batch_size: rows per call.
        max_length: most tokens in a row; default the model's context length.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}", "give at least 1")
        known = compiled.program.origin.get("context_length")
        self.compiled = compiled
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = int(max_length or known or _DEFAULT_CONTEXT_LENGTH)
        self._device = compiled.program.device
        self._vocabulary = Vocabulary(tokenizer)

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return cast(int, self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Token that stands before a text without context."""
        bos = cast("int | None", self.tokenizer.bos_token_id)
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches tokenized requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text; no second BOS token if the text starts with one."""
        prefix = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and _models.has_bos_prefix(string, prefix):
            add_special_tokens = False
        if add_special_tokens is not None:
            kwargs["add_special_tokens"] = add_special_tokens
        return cast(list[int], self.tokenizer.encode(string, **kwargs))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one prompt."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows where they exceed the context."""
        windows: list[_Window] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            rolling = _utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(_utils.make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (score, _) in zip(owners, scores, strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[_Window],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, and whether each is the greedy one.

        Requests that differ in their last token only, as multiple-choice answers often do, share
        one forward pass.
        """
        sharing: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_text, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens, max_length is "
                    f"{self.max_length}",
                    "give CompiledLM a larger max_length",
                )
            sharing[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(index)
        answers: dict[int, tuple[float, bool]] = {}
        longest_first = sorted(sharing, key=len, reverse=True)
        for rows in self._batches(longest_first, "log-likelihoods", disable_tqdm):
            for row, logits in zip(rows, self._logits(rows), strict=True):
                for index in sharing[row]:
                    text, _context, continuation = requests[index]
                    answers[index] = _score(logits[: len(row)], continuation)
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answers[index])
        return [answers[index] for index in range(len(requests))]

    def _logits(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """Logits [B, S, V]; padding on the right cannot reach real tokens of a causal model."""
        shape = (len(rows), max(len(row) for row in rows))
        ids = torch.zeros(shape, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        device = self._device
        with torch.no_grad():
            return self.compiled(ids.to(device), attention_mask=mask.to(device)).logits

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue prompts until a stop string, which is cut off."""
        alike: defaultdict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[repr(request.args[1])].append(index)
        texts: dict[int, str] = {}
        for group in alike.values():
            encoded = {index: self.tok_encode(requests[index].args[0]) for index in group}
            longest_first = sorted(group, key=lambda index: -len(encoded[index]))
            for rows in self._batches(longest_first, "texts", disable_tqdm):
                options = cast(dict[str, Any], requests[rows[0]].args[1])
                answers = self._generate([encoded[index] for index in rows], options)
                for index, text in zip(rows, answers, strict=True):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return [texts[index] for index in range(len(requests))]

    def _generate(self, prompts: list[list[int]], gen_kwargs: dict[str, Any]) -> list[str]:
        options = cast(
            dict[str, Any], _models.normalize_gen_kwargs(gen_kwargs, _DEFAULT_NEW_TOKENS)
        )
        end = str(self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False))
        until = _models.handle_stop_sequences(options.pop("until", None), eos=end)
        new_tokens = int(options.pop("max_gen_toks"))
        room = self.max_length - new_tokens
        if room < 1:
            raise InputError(
                f"max_gen_toks={new_tokens} leaves no room in max_length={self.max_length}",
                "ask for fewer tokens",
            )
        if not options.get("do_sample"):
            options.pop("temperature", None)
        cut = [torch.tensor(prompt[-room:], device=self._device) for prompt in prompts]
        stop = _StopInAnswer(until, self._vocabulary, len(prompts))
        output = self.compiled.generate(
            cut, max_new_tokens=new_tokens, on_token=stop, return_dict=True, **options
        )
        return [
            _models.postprocess_generated_text(
                str(self.tokenizer.decode(tokens, skip_special_tokens=True)), until, None
            )
            for tokens in cast(Any, output).new_tokens
        ]

    def _batches(self, items: Sequence[_T], what: str, quiet: bool) -> Iterator[Sequence[_T]]:
        with tqdm(total=len(items), desc=f"Computing {what}", disable=quiet) as progress:
            for start in range(0, len(items), self.batch_size):
                chunk = items[start : start + self.batch_size]
                yield chunk
                progress.update(len(chunk))


class _StopInAnswer:
    """Ends rows at stop strings that lie wholly in the answer, as the harness wants it."""

    def __init__(self, until: Sequence[str], vocabulary: Vocabulary, rows: int) -> None:
        texts = [text for text in until if text]
        self._matchers = [StopStringMatcher(texts, vocabulary) for _ in range(rows)]

    def __call__(self, tokens: Tensor, ended: Tensor) -> list[bool]:
        """See ``fxgraft.generation.Callback``."""
        values = cast(Iterable[int], cast(Any, tokens).tolist())
        return [matcher.push(token) for matcher, token in zip(self._matchers, values, strict=True)]


def _score(logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Score a continuation by the logits [S, V] of its context and all but its last token."""
    rows = logits[-len(continuation) :].float().log_softmax(dim=-1)
    target = torch.tensor(continuation, device=rows.device)
    chosen = rows.gather(-1, target[:, None])
    return float(chosen.sum()), bool((rows.argmax(dim=-1) == target).all())
