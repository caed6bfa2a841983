"""Tiny random models that are no causal language models, for the coverage benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import transformers

_LIBRARY = cast(Any, transformers)
_VOCABULARY = 99


@dataclass(frozen=True)
class Case:
    """A model and how to call it.

    Attributes:
        model: the model.
        inputs: makes inputs for a batch size and a length.
        outputs: names of the outputs to compare.
        dynamic: dynamic dimensions per input.
        options: further arguments of the original model.
    """

    model: Any
    inputs: Callable[[int, int], dict[str, torch.Tensor]]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]] | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])


def _text(batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(4, _VOCABULARY - 3, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _pixels(batch: int, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def _small(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, **more,
    }  # fmt: skip


def _make(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    return getattr(_LIBRARY, name)(config).eval()


def bert() -> Case:
    """BERT, masked language model."""
    config = _LIBRARY.BertConfig(**_small(vocab_size=_VOCABULARY))
    return Case(_make("BertForMaskedLM", config), _text, ("logits",))


def t5() -> Case:
    """T5, encoder and decoder."""
    config = _LIBRARY.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=_VOCABULARY
    )

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        return {**_text(batch, length), "decoder_input_ids": _text(batch, length - 5)["input_ids"]}

    options = {"use_cache": False}
    return Case(_make("T5ForConditionalGeneration", config), inputs, ("logits",), None, options)


def vit() -> Case:
    """ViT, image classification."""
    config = _LIBRARY.ViTConfig(**_small(image_size=32, patch_size=8, num_labels=5))

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": _pixels(batch)}

    return Case(_make("ViTForImageClassification", config), inputs, ("logits",))


def clip() -> Case:
    """CLIP, images against texts."""
    config = _LIBRARY.CLIPConfig(
        text_config=_small(vocab_size=_VOCABULARY, max_position_embeddings=64),
        vision_config=_small(image_size=32, patch_size=8),
        projection_dim=16,
    )

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        return {**_text(batch, length), "pixel_values": _pixels(batch + 1)}

    dynamic = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "sequence"},
        "pixel_values": {0: "images"},
    }
    return Case(_make("CLIPModel", config), inputs, ("logits_per_image", "text_embeds"), dynamic)


def llava() -> Case:
    """LLaVA: two images, at the start of the first two texts.

    transformers' code walks over the images in Python, so their number is fixed at capture; the
    number of texts and their length are dynamic.
    """
    image_token, patches, images = _VOCABULARY - 1, 16, 2
    config = _LIBRARY.LlavaConfig(
        text_config=_LIBRARY.LlamaConfig(**_small(vocab_size=_VOCABULARY, num_key_value_heads=2)),
        vision_config=_LIBRARY.CLIPVisionConfig(**_small(image_size=32, patch_size=8)),
        image_token_index=image_token,
    )

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        ids = _text(batch, patches + length)["input_ids"]
        ids[:images, :patches] = image_token
        mask = torch.ones(batch, patches + length, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": _pixels(images)}

    text = {0: "batch", 1: "sequence"}
    dynamic = {"input_ids": text, "attention_mask": text}
    model = _make("LlavaForConditionalGeneration", config)
    return Case(model, inputs, ("logits",), dynamic, {"use_cache": False})


def _with_images(model: Any, token: int, counts: list[int], images: dict[str, torch.Tensor],
                 types: str | None = None) -> Case:  # fmt: skip
    """Two images, of which sizes are fixed at capture, at the start of the first two texts."""

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        ids = _text(batch, max(counts) + length)["input_ids"]
        for row, count in enumerate(counts):
            ids[row, :count] = token
        values = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
        return values | ({types: (ids == token).int()} if types else {})

    return Case(model, inputs, ("logits",), None, {"use_cache": False})


def llava_next() -> Case:
    """LLaVA-NeXT: a wide and a narrow image, each whole and in tiles."""
    token = _VOCABULARY - 1
    config = _LIBRARY.LlavaNextConfig(
        text_config=_LIBRARY.LlamaConfig(**_small(vocab_size=_VOCABULARY, num_key_value_heads=2)),
        vision_config=_LIBRARY.CLIPVisionConfig(**_small(image_size=16, patch_size=8)),
        image_token_id=token, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )  # fmt: skip
    images = {
        "pixel_values": _pixels(6, 16).view(2, 3, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 32], [32, 16]]),
    }
    model = _make("LlavaNextForConditionalGeneration", config)
    # Four tokens of the whole image, then two tiles with one more token at the end of each line.
    return _with_images(model, token, [4 + 2 * 5, 4 + 4 * 3], images)


def _qwen_vl(version: str, vision: dict[str, Any]) -> Case:
    token = _VOCABULARY - 1
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = _small(vocab_size=_VOCABULARY, num_key_value_heads=2, rope_parameters=rotary,
                  bos_token_id=None, eos_token_id=None)  # fmt: skip
    common = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
    config = getattr(_LIBRARY, f"Qwen{version}VLConfig")(
        text_config=text, vision_config={**common, **vision}, image_token_id=token,
        video_token_id=3, vision_start_token_id=2, vision_end_token_id=1,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    images = {
        "pixel_values": torch.randn(4 * 6 + 8 * 4, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 8, 4]]),
    }
    model = _make(f"Qwen{version}VLForConditionalGeneration", config)
    return _with_images(model, token, [6, 8], images, "mm_token_type_ids")


def qwen2_vl() -> Case:
    """Qwen2-VL: positions along time, height and width."""
    return _qwen_vl("2", {"embed_dim": 32, "hidden_size": 32})


def qwen2_5_vl() -> Case:
    """Qwen2.5-VL: its tower attends within windows, too."""
    sizes = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}
    return _qwen_vl("2_5_", {**sizes, "window_size": 16, "fullatt_block_indexes": [1]})


def whisper() -> Case:
    """Whisper, speech to text."""
    config = _LIBRARY.WhisperConfig(
        vocab_size=_VOCABULARY, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_source_positions=20, max_target_positions=40, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, begin_suppress_tokens=None,
    )  # fmt: skip

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(batch)
        return {
            "input_features": torch.randn(batch, 8, 40, generator=generator),
            "decoder_input_ids": _text(batch, length)["input_ids"],
        }

    options = {"use_cache": False}
    model = _make("WhisperForConditionalGeneration", config)
    return Case(model, inputs, ("logits",), None, options)


MODELS: dict[str, Callable[[], Case]] = {
    "BERT": bert, "T5": t5, "ViT": vit, "CLIP": clip, "LLaVA": llava, "LLaVA-NeXT": llava_next,
    "Qwen2-VL": qwen2_vl, "Qwen2.5-VL": qwen2_5_vl, "Whisper": whisper,
}  # fmt: skip
