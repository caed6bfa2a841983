"""A compiled model as a transformers model, for ``transformers.pipeline``.

>>> model = as_transformers(compiled)                                        # doctest: +SKIP
>>> pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)     # doctest: +SKIP
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutput

from fxgraft.errors import InputError
from fxgraft.runtime.adapters.compiled import CompiledModel

# Options that change tokens and that fxgraft does not have, with the values that do nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "prompt_lookup_num_tokens": (),
    "guidance_scale": (1.0,),
    "sequence_bias": (),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "watermarking_config": (),
    "max_time": (),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "logits_processor": ([],),
    "prefix_allowed_tokens_fn": (),
    "assistant_model": (),
    "inputs_embeds": (),
}
_OPTIONS = (
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "repetition_penalty",
    "eos_token_id",
    "pad_token_id",
    "stop_strings",
)
# transformers ignores these, whatever their values, unless it samples.
_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p")
# transformers' own defaults where they differ from fxgraft's.
_DEFAULT_TOP_K = 50
_DEFAULT_NEW_TOKENS = 20


class CompiledConfig(PreTrainedConfig):
    """Configuration of a compiled model: what generation and pipelines ask for."""

    model_type = "fxgraft"


class CompiledCausalLM(PreTrainedModel, GenerationMixin):
    """A compiled causal language model with the interface of a transformers model.

    It holds no weights of its own and cannot be trained, moved or saved; do these with the
    original model, or with the compiled one.
    """

    config_class = CompiledConfig
    _supports_sdpa = True

    def __init__(self, compiled: CompiledModel, tokenizer: Any = None) -> None:
        origin = compiled.program.origin
        cast(Any, super()).__init__(_config(origin))
        self.compiled = compiled
        self.tokenizer = tokenizer
        self.generation_config = GenerationConfig(**origin.get("generation", {}))
        self.eval()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.compiled.program.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first floating-point weight."""
        weights = (weight.dtype for _, weight in self.compiled.program.weights())
        return next((t for t in weights if t.is_floating_point), torch.float32)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of weight elements; none are trainable.

        Raises:
            InputError: asked to leave out embeddings, which a Program does not set apart.
        """
        if exclude_embeddings:
            raise InputError("embeddings are not counted apart", "use exclude_embeddings=False")
        return 0 if only_trainable else self.compiled.program.count_parameters()

    def to(self, *args: Any, **kwargs: Any) -> CompiledCausalLM:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Nothing, if the model is there already.

        Raises:
            InputError: another device or type is asked for; compiled code has its own.
        """
        here = torch.empty(0, device=self.device, dtype=self.dtype)
        there = here.to(*args, **kwargs)
        if (there.device, there.dtype) != (here.device, here.dtype):
            raise InputError(
                f"the model was compiled for {here.device} and {here.dtype}",
                f"pass device={str(here.device)!r} to pipeline(), or compile the model again",
            )
        return self

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            InputError: always: this object has no weights.
        """
        raise InputError("a compiled model is no transformers checkpoint", "use compiled.save()")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """Logits [B, S, V] of tokens int64 [B, S]."""
        return CausalLMOutput(logits=self.compiled(input_ids, attention_mask=attention_mask).logits)

    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """``compiled.generate`` with transformers' arguments and defaults.

        Args:
            inputs: prompts int64 [B, S]; also as ``input_ids``. None starts from the BOS token.
            generation_config: its options count below those given by name.
            kwargs: fields of ``GenerationConfig``, and ``attention_mask``, ``tokenizer``,
                ``streamer``, ``stopping_criteria``.

        Returns:
            int64 [B * num_return_sequences, S + N], or with ``return_dict_in_generate`` an
            object that holds them as ``sequences``.

        Raises:
            InputError: an option that fxgraft does not have is set to a value with an effect.
        """
        settings, extra = _merge(self.generation_config, generation_config, kwargs)
        _refuse_unsupported({**settings, **extra})
        ids = extra.get("input_ids", inputs)
        ids = self._first_token() if ids is None else ids
        mask = extra.get("attention_mask")
        copies: int = settings.get("num_return_sequences") or 1
        ids = ids.repeat_interleave(copies, dim=0)
        mask = None if mask is None else mask.repeat_interleave(copies, dim=0)
        watcher = _Watcher(ids, extra.get("streamer"), extra.get("stopping_criteria"))
        sequences = self.compiled.generate(
            ids,
            mask,
            tokenizer=extra.get("tokenizer") or self.tokenizer,
            on_token=watcher if watcher.is_needed else None,
            **_options(settings, ids.shape[1]),
        )
        watcher.end()
        if settings.get("return_dict_in_generate"):
            return GenerateDecoderOnlyOutput(sequences=cast(Any, sequences))
        return sequences

    def _first_token(self) -> Tensor:
        bos: int | None = cast(Any, self.generation_config).bos_token_id
        if bos is None:
            raise InputError("the prompt is empty", "give at least one token")
        return torch.tensor([[bos]], device=self.device)


def as_transformers(compiled: CompiledModel, tokenizer: Any = None) -> CompiledCausalLM:
    """Make a compiled model acceptable to ``transformers.pipeline("text-generation", ...)``.

    The class is named like the model's own, by which pipelines know what they support.

    Args:
        compiled: a compiled causal language model.
        tokenizer: stands in where ``stop_strings`` are given without one.
    """
    name = str(compiled.program.origin.get("class", CompiledCausalLM.__name__))
    named = type(name, (CompiledCausalLM,), {"__module__": __name__})
    return named(compiled, tokenizer)


def _config(origin: Mapping[str, Any]) -> CompiledConfig:
    config = CompiledConfig(architectures=[str(origin.get("class"))])
    # Set on the instance: other libraries ask a model's configuration for its family.
    cast(Any, config).model_type = origin.get("model_type", CompiledConfig.model_type)
    cast(Any, config).max_position_embeddings = origin.get("context_length")
    return config


def _merge(
    own: GenerationConfig, given: GenerationConfig | None, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings (by name over given over the model's own), and what is no setting."""
    settings: Any = copy.deepcopy(given or GenerationConfig())
    settings.update(**own.to_dict(), defaults_only=True, allow_custom_entries=True)
    extra: dict[str, Any] = settings.update(**kwargs)
    return settings.to_dict(), extra


def _refuse_unsupported(settings: Mapping[str, Any]) -> None:
    for name, harmless in _UNSUPPORTED.items():
        value = settings.get(name)
        if value is not None and value not in harmless:
            raise InputError(
                f"option {name}={value!r} is not available in a compiled model",
                "leave it out, or generate with the original model",
            )


def _options(settings: Mapping[str, Any], prompt_length: int) -> dict[str, Any]:
    options = {name: settings.get(name) for name in _OPTIONS}
    if settings.get("do_sample"):
        options.update({name: settings.get(name) for name in _SAMPLING_OPTIONS})
        if options["top_k"] is None:
            options["top_k"] = _DEFAULT_TOP_K
    max_length, min_length = settings.get("max_length"), settings.get("min_length")
    if options["max_new_tokens"] is None:
        new_tokens = _DEFAULT_NEW_TOKENS if max_length is None else max_length - prompt_length
        options["max_new_tokens"] = new_tokens
    if options["min_new_tokens"] is None and min_length:
        options["min_new_tokens"] = max(min_length - prompt_length, 0)
    return options


class _Watcher:
    """Feeds a streamer and asks stopping criteria, step by step."""

    def __init__(self, input_ids: Tensor, streamer: Any, criteria: Any) -> None:
        self._sequences, self._streamer, self._criteria = input_ids, streamer, criteria
        if streamer is not None:
            streamer.put(input_ids.cpu())

    @property
    def is_needed(self) -> bool:
        """Whether there is anybody to tell."""
        return self._streamer is not None or bool(self._criteria)

    def __call__(self, tokens: Tensor, ended: Tensor) -> Tensor | None:
        """See ``fxgraft.generation.Callback``."""
        if self._streamer is not None:
            self._streamer.put(tokens.cpu())
        if not self._criteria:
            return None
        self._sequences = torch.cat([self._sequences, tokens[:, None]], dim=1)
        stop = torch.zeros_like(ended)
        for criterion in self._criteria:
            stop |= torch.as_tensor(criterion(self._sequences, None)).cpu()
        return stop

    def end(self) -> None:
        """Tell the streamer that this was all."""
        if self._streamer is not None:
            self._streamer.end()
