"""A tiny LLaVA in a folder with its processor, and servers over it."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from fastapi import FastAPI
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import fxgraft
from fxgraft.runtime.serve.options import ServeOptions
from fxgraft.runtime.serve.startup import app_of
from tests import model_folder

_LIBRARY = cast(Any, transformers)
SIZE, PATCH, TOKENS = 32, 8, 16
"""Of an image for the model: its side, that of a patch, and the number of its tokens."""
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_processor(folder: Path, template: str | None = TEMPLATE) -> int:
    """A tokenizer that knows the image token, and an image processor; gives the token's id."""
    model_folder.write_tokenizer(folder)
    tokenizer = cast(Any, PreTrainedTokenizerFast).from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = {"height": SIZE, "width": SIZE}
    pictures = _LIBRARY.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=side)
    _LIBRARY.LlavaProcessor(
        pictures, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return int(tokenizer.convert_tokens_to_ids("<image>"))


def _model(image_token: int) -> nn.Module:
    small = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    config = _LIBRARY.LlavaConfig(
        text_config=_LIBRARY.LlamaConfig(
            **small, vocab_size=image_token + 1, num_key_value_heads=2, max_position_embeddings=256
        ),
        vision_config=_LIBRARY.CLIPVisionConfig(**small, image_size=SIZE, patch_size=PATCH),
        image_token_id=image_token,
    )
    torch.manual_seed(0)
    model = _LIBRARY.LlavaForConditionalGeneration(config).eval()
    # Random weights of the usual size make scores that hardly differ.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(8)
    return model


def write_model(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Weights, config, tokenizer and processor, as one finds them on the hub."""
    cast(Any, _model(write_processor(folder, template))).save_pretrained(folder)
    return folder


def capture(folder: Path) -> fxgraft.Program:
    """The model in a folder, with images."""
    image = int(_config(folder).image_token_id)
    ids = torch.tensor([[5, *[image] * TOKENS, 6, 7], [*[image] * TOKENS, 8, 9, 10]])
    mask = torch.ones_like(ids)
    example = {
        "input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(1) - 1,
        "pixel_values": torch.zeros(2, 3, SIZE, SIZE),
    }  # fmt: skip
    tokens = {name: {0: "batch", 1: "sequence"} for name in list(example)[:3]}
    return fxgraft.capture(folder, example, dynamic=tokens)


def _config(folder: Path) -> Any:
    return _LIBRARY.AutoConfig.from_pretrained(folder)


@cache
def compiled(folder: Path) -> fxgraft.Compiled:
    """The captured model."""
    program = capture(folder)
    return fxgraft.compile(program, ["optimize"], backend="torch", options={"mode": "eager"})


def vision_app(folder: Path, processor: Any = None, **options: Any) -> FastAPI:
    """A server of the model ``tiny``; 4 requests at once."""
    tokenizer = cast(Any, PreTrainedTokenizerFast).from_pretrained(folder)
    values = {"max_batch": 4, "memory_bytes": 2**22, **options}
    limits = ServeOptions.model_validate(values)
    return app_of(compiled(folder), tokenizer, name="tiny", options=limits, processor=processor)


def picture(seed: int, width: int = 40, height: int = 36) -> Image.Image:
    """Random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def address(image: Image.Image, kind: str = "PNG") -> str:
    """An image as a ``data:`` address."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return data(buffer.getvalue(), kind.lower())


def data(raw: bytes, kind: str = "png") -> str:
    """Bytes as a ``data:`` address."""
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def part(url: str) -> dict[str, Any]:
    """An image part of a message."""
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    """A text part of a message."""
    return {"type": "text", "text": text}


def expected(folder: Path, contents: list[Any], count: int) -> tuple[list[int], str]:
    """Prompt tokens and what ``generate`` answers.

    Args:
        folder: of the model.
        contents: of one message by a user: texts and images.
        count: new tokens.
    """
    processor = _LIBRARY.AutoProcessor.from_pretrained(folder)
    parts = [
        {"type": "text", "text": item}
        if isinstance(item, str)
        else {"type": "image", "image": item}
        for item in contents
    ]
    encoded = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip
    ids: Tensor = encoded["input_ids"]
    images = {"pixel_values": encoded["pixel_values"]} if "pixel_values" in encoded else None
    result = compiled(folder).generate(ids, images=images, max_new_tokens=count, eos_token_id=[])
    answer = processor.tokenizer.decode(result[0, ids.shape[1] :], skip_special_tokens=True)
    return ids[0].tolist(), str(answer)
