"""Keys of prefixes: equal keys, equal tokens and images from the beginning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from fxgraft.runtime.engine.prompt_images import PromptImages


def seed_key(inputs: Mapping[str, float], choices: Mapping[str, int]) -> bytes:
    """Key of the empty prefix; requests that set inputs differently share nothing."""
    text = json.dumps([sorted(inputs.items()), sorted(choices.items())])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def block_keys(
    seed: bytes,
    tokens: Sequence[int],
    block_size: int,
    known: Sequence[bytes] = (),
    images: PromptImages | None = None,
) -> list[bytes]:
    """Keys of all prefixes that fill blocks.

    Args:
        seed: key of the empty prefix.
        tokens: prompt and more.
        block_size: tokens per block.
        known: keys that were computed before for the first blocks.
        images: of the prompt; what they look like counts from their first token on.
    """
    keys = list(known)
    for start in range(len(keys) * block_size, len(tokens) - block_size + 1, block_size):
        content = np.asarray(tokens[start : start + block_size], dtype=np.int64).tobytes()
        if images is not None:
            content += images.content(start, start + block_size)
        before = keys[-1] if keys else seed
        keys.append(hashlib.blake2b(before + content, digest_size=16).digest())
    return keys
