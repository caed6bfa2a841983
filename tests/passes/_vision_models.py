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
        tokens: image tokens of an image, of the first if they differ.
        images: image inputs for two images.
        types: the input that tells what kind of token each is, if the model takes one:
            ``token_type_ids`` is 1 where a token may not look ahead, ``mm_token_type_ids`` where
            it belongs to an image.
        second: image tokens of the second image, if it has not as many.
    """

    model: nn.Module
    tokens: int
    images: dict[str, Tensor]
    types: str | None = None
    second: int | None = None

    def inputs(self, rows: list[str], tokens: tuple[int, ...] | None = None) -> dict[str, Tensor]:
        """Texts padded on the left.

        Args:
            rows: one letter per token: ``t`` for text, ``I`` for a whole image.
            tokens: image tokens per image, in the order of the images; default those of the
                case, and of the first image for any more.
        """
        generator = torch.Generator().manual_seed(5)
        counts = iter([*(tokens or (self.tokens, self.second or self.tokens)), *[self.tokens] * 9])
        texts: list[list[int]] = []
        for row in rows:
            words = cast(Any, torch.randint(4, 90, (len(row),), generator=generator)).tolist()
            pieces = [
                [IMAGE] * next(counts) if c == "I" else [w] for c, w in zip(row, words, strict=True)
            ]
            texts.append([token for piece in pieces for token in piece])
        width = max(map(len, texts))
        ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
        values = {"input_ids": ids, "attention_mask": mask, **self.images}
        if self.types == "token_type_ids":
            after = (ids == IMAGE).long().flip(1).cumsum(1).flip(1) == 0
            values[self.types] = (after & (mask == 1)).long()
        elif self.types is not None:
            values[self.types] = (ids == IMAGE).int()
        return values

    def prompts(self, rows: list[str], tokens: tuple[int, ...] | None = None) -> dict[str, Tensor]:
        """Texts to be continued, which a model may read in both directions."""
        values = self.inputs(rows, tokens)
        if self.types == "token_type_ids":
            values[self.types] = torch.zeros_like(values["input_ids"])
        return values

    @cache  # noqa: B019  (cases live as long as the tests)
    def program(self) -> Program:
        """The model, captured with two images."""
        example = self.inputs(["ttIttt", "tIt"])
        names = ("input_ids", "attention_mask", *([self.types] if self.types else []))
        return fxgraft.capture(self.model, example, dynamic=dict.fromkeys(names, _TEXT_AXES))


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
        # The highest of all scores is never 0, so that answers hold no image tokens.
        model.lm_head.weight[IMAGE] = 0
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
        # Tied weights would have it repeat its last token.
        tie_word_embeddings=False,
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
        tie_word_embeddings=False,
    )
    images = {"pixel_values": _pixels(2, 3, 32, 32)}
    return Case(_make("PaliGemma", config), 16, images, "token_type_ids")


@cache
def llava_next() -> Case:
    """LLaVA-NeXT: a whole image and its tiles, unpadded, with a token at the end of each line."""
    config = _LIBRARY.LlavaNextConfig(
        text_config=_LIBRARY.LlamaConfig(**_text()),
        vision_config=_LIBRARY.CLIPVisionConfig(**_small(image_size=16, patch_size=8)),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    # Three tiles each: a wide image without padding, and a narrow one between two columns of it.
    images = {
        "pixel_values": _pixels(2, 3, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 32], [32, 8]]),
    }
    return Case(_make("LlavaNext", config), 4 + 2 * 5, images, second=4 + 4 * 3)


def _qwen(version: str, text: dict[str, Any], vision: dict[str, Any]) -> Case:
    vision = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, **vision}
    rotary = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
    special = {"vision_start_token_id": 91, "vision_end_token_id": 92, "video_token_id": 93}
    config = getattr(_LIBRARY, f"Qwen{version}VLConfig")(
        text_config=_text(rope_parameters=rotary, **text), vision_config=vision,
        image_token_id=IMAGE, **special,
    )  # fmt: skip
    images = {
        "pixel_values": _pixels(4 * 6 + 8 * 4, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 8, 4]]),
    }
    return Case(_make(f"Qwen{version}VL", config), 6, images, "mm_token_type_ids", second=8)


@cache
def qwen2_vl() -> Case:
    """Qwen2-VL: images of any size, positions along time, height and width."""
    tokens = {"bos_token_id": None, "eos_token_id": None}
    return _qwen("2", tokens, {"embed_dim": 32, "hidden_size": 32})


@cache
def qwen2_5_vl() -> Case:
    """Qwen2.5-VL: one layer of its tower attends within windows, the other to whole images."""
    vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    return _qwen("2_5_", tokens, {**vision, "window_size": 16, "fullatt_block_indexes": [1]})


MODELS: dict[str, Callable[[], Case]] = {
    "llava": llava, "internvl": internvl, "smolvlm": smolvlm, "paligemma": paligemma,
    "llava_next": llava_next, "qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl,
}  # fmt: skip
SIZED: dict[str, Callable[[], Case]] = {
    "llava_next": llava_next, "qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl,
}  # fmt: skip
"""Those that read the sizes of images as numbers."""
