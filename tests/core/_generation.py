"""For tests of generation: a tiny Llama as a step model, two tiny tokenizers, prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from hypothesis import settings
from torch import Tensor, nn

from fxgraft.generation import generate
from tests import models

CONTEXT_LENGTH = 64
_TEXT = (
    "the quick brown fox jumps over the lazy dog, then it stops. stop, stopper, topper! "
    "naïve café 日本語 🙂\n\n"
)


@dataclass
class LlamaSteps:
    """A transformers model with its own cache as a ``StepModel``.

    Attributes:
        change: called with each step's logits [B, V] and its number; edits them in place.
        batches: number of rows of each step so far.
    """

    model: nn.Module
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    context_length: int | None = CONTEXT_LENGTH
    takes_positions: bool = True
    change: Callable[[Tensor, int], None] = lambda logits, step: None
    batches: list[int] = field(default_factory=list[int])

    @property
    def vocab_size(self) -> int:
        return cast(Any, self.model).config.vocab_size

    def empty_state(self, batch: int) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=cast(Any, self.model).config)

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, state: Any
    ) -> tuple[Tensor, Any]:
        self.batches.append(len(input_ids))
        assert attention_mask.shape == (len(input_ids), state.get_seq_length() + input_ids.shape[1])
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=state,
            use_cache=True,
        )
        logits = output.logits[:, -1]
        self.change(logits, len(self.batches) - 1)
        return logits, output.past_key_values

    def select(self, state: Any, rows: Tensor) -> Any:
        state.batch_select_indices(rows)
        return state


@cache
def tiny_llama() -> nn.Module:
    """A Llama with the vocabulary of ``byte_level_tokenizer`` and some ids more.

    It hardly ever answers with parts of characters, so that its answers hold stop strings.
    """
    tokenizer = byte_level_tokenizer()
    model = models.llama(
        vocab_size=len(tokenizer) + 5,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    parts = [index for index in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([index])]
    cast(Any, model).lm_head.weight.data[parts] = 0
    return model


@cache
def byte_level_tokenizer() -> Any:
    """Trained on a line of text: 256 bytes and some words, as GPT-2, Llama 3 and Qwen have."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as algorithms
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(algorithms.BPE())
    byte_level: Any = pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = cast(Any, decoders).ByteLevel()
    trainer = cast(Any, trainers).BpeTrainer(
        vocab_size=330,
        initial_alphabet=byte_level.alphabet(),
        special_tokens=["<|end|>", "<|pad|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    made = cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", padding_side="left"
    )
    made.add_tokens(["  é  ", "naïf"])
    return made


@cache
def byte_fallback_tokenizer() -> Any:
    """Words with spaces as ``▁``, unknown characters as ``<0xNN>``, as Llama 2 and Gemma have."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers import models as algorithms
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [*"abestopr", "st", "op", "▁st", "stop", "▁a", "er"]
    merges = [("s", "t"), ("o", "p"), ("▁", "st"), ("st", "op"), ("▁", "a"), ("e", "r")]
    tokenizer: Any = cast(Any, Tokenizer)(
        cast(Any, algorithms).BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    normal, decode = cast(Any, normalizers), cast(Any, decoders)
    tokenizer.normalizer = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
    tokenizer.decoder = decode.Sequence(
        [decode.Replace("▁", " "), decode.ByteFallback(), decode.Fuse(), decode.Strip(" ", 1, 0)]
    )
    return cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


PROMPTS = [[5, 17, 93, 20, 41, 7, 77], [30], [12, 99, 12, 12]]
PAD = 1
quick = settings(max_examples=60, deadline=None)


def padded(prompts: Sequence[Sequence[int]] = PROMPTS) -> dict[str, Any]:
    width = max(len(prompt) for prompt in prompts)
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(p)) + list(p) for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def steps(**fields: Any) -> LlamaSteps:
    return LlamaSteps(tiny_llama(), **fields)


def run(model: LlamaSteps, *prompt: Any, **options: Any) -> Tensor:
    """``generate`` with options from a dictionary."""
    return generate(model, *prompt, return_dict=False, **options)


def reference(**arguments: Any) -> Tensor:
    """What transformers generates."""
    return cast(Any, tiny_llama()).generate(**arguments)


def new_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """Greedy continuation without any end."""
    ids = generate(steps(), [prompt], max_new_tokens=count)
    return cast(Any, ids[0, len(prompt) :]).tolist()
