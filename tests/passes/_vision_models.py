"""Tiny random vision-language models of the real classes, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

import fxgraft
from fxgraft.program import Program

_LIBRARY = cast(Any, transformers)
VOCABULARY = 99
IMAGE = 98
"""The image token."""
_TEXT_AXES = {0: "batch", 1: "sequence"}


@dataclass(frozen=True, eq=False)
class Case:
    """A model and how its images appear among its tokens.

    Attributes:
        model: the model.
        tokens: image tokens per image.
        images: image inputs for two images.
        token_types: whether it wants to be told which tokens may look ahead.
    """

    model: nn.Module
    tokens: int
    images: dict[str, Tensor]
    token_types: bool = False

    def inputs(self, rows: list[str]) -> dict[str, Tensor]:
        """Texts padded on the left.

        Args:
            rows: one letter per token: ``t`` for text, ``I`` for a whole image.
        """
        generator = torch.Generator().manual_seed(5)
        texts: list[list[int]] = []
        for row in rows:
            words = cast(Any, torch.randint(4, 90, (len(row),), generator=generator)).tolist()
            pieces = [
                [IMAGE] * self.tokens if c == "I" else [w] for c, w in zip(row, words, strict=True)
            ]
            texts.append([token for piece in pieces for token in piece])
        width = max(map(len, texts))
        ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
        values = {"input_ids": ids, "attention_mask": mask, **self.images}
        if self.token_types:
            after = (ids == IMAGE).long().flip(1).cumsum(1).flip(1) == 0
            values["token_type_ids"] = (after & (mask == 1)).long()
        return values

    @cache  # noqa: B019  (cases live as long as the tests)
    def program(self) -> Program:
        """The model, captured with two images."""
        example = self.inputs(["ttIttt", "tIt"])
        names = ("input_ids", "attention_mask", "token_type_ids")
        dynamic = {name: _TEXT_AXES for name in names if name in example}
        return fxgraft.capture(self.model, example, dynamic=dynamic)


def _small(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, **more,
    }  # fmt: skip


def _text(**more: Any) -> dict[str, Any]:
    return _small(vocab_size=VOCABULARY, num_key_value_heads=2, **more)


def _make(name: str, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(_LIBRARY, f"{name}ForConditionalGeneration")(config).eval()
    # Random weights of the usual size make scores that hardly differ.
    with torch.no_grad():
        for parameter_name, weight in model.named_parameters():
            if "q_proj" in parameter_name or "k_proj" in parameter_name:
                weight.mul_(8)
    return model


def _pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@cache
def llava(kv_heads: int = 2, layers: int = 2) -> Case:
    """LLaVA: CLIP and Llama, 16 tokens per image."""
    text = {**_text(), "num_key_value_heads": kv_heads, "num_hidden_layers": layers}
    config = _LIBRARY.LlavaConfig(
        text_config=_LIBRARY.LlamaConfig(**text),
        vision_config=_LIBRARY.CLIPVisionConfig(**_small(image_size=32, patch_size=8)),
        image_token_id=IMAGE,
    )
    return Case(_make("Llava", config), 16, {"pixel_values": _pixels(2, 3, 32, 32)})


@cache
def internvl() -> Case:
    """InternVL: its own tower and Qwen 2, 4 tokens per image."""
    config = _LIBRARY.InternVLConfig(
        text_config=_LIBRARY.Qwen2Config(**_text()),
        vision_config=_small(image_size=[32, 32], patch_size=[8, 8]),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return Case(_make("InternVL", config), 4, {"pixel_values": _pixels(2, 3, 32, 32)})


@cache
def smolvlm() -> Case:
    """SmolVLM: its own tower and Llama, 4 tokens per image."""
    config = _LIBRARY.SmolVLMConfig(
        text_config=_LIBRARY.LlamaConfig(**_text()),
        vision_config=_small(image_size=32, patch_size=8),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    images = {
        "pixel_values": _pixels(2, 1, 3, 32, 32),
        "pixel_attention_mask": torch.ones(2, 1, 32, 32, dtype=torch.bool),
    }
    return Case(_make("SmolVLM", config), 4, images)


@cache
def paligemma() -> Case:
    """PaliGemma: SigLIP and Gemma, which sees its prefix in both directions."""
    config = _LIBRARY.PaliGemmaConfig(
        text_config=_LIBRARY.GemmaConfig(**_text(head_dim=8)),
        vision_config=_LIBRARY.SiglipVisionConfig(**_small(image_size=32, patch_size=8)),
        image_token_id=IMAGE,
        projection_dim=32,
    )
    images = {"pixel_values": _pixels(2, 3, 32, 32)}
    return Case(_make("PaliGemma", config), 16, images, token_types=True)


MODELS: dict[str, Callable[[], Case]] = {
    "llava": llava, "internvl": internvl, "smolvlm": smolvlm, "paligemma": paligemma,
}  # fmt: skip
