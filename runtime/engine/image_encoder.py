"""Encoding the images of prompts, once, and refusing those that do not fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from weakref import WeakValueDictionary

import numpy as np
from torch import Tensor

from fxgraft import images
from fxgraft.backend import Compiled
from fxgraft.errors import InputError
from fxgraft.program import Program
from fxgraft.runtime.engine.failures import as_error
from fxgraft.runtime.engine.prompt_images import DIGEST, Features, PromptImages, bytes_of


class ImageEncoder:
    """Encodes images for the prompts of one model.

    Images that a request still uses are not encoded again for another one.

    Args:
        compiled: the whole model; one that takes no images refuses them.

    Attributes:
        names: of the image inputs, in order; none where the model takes no images.
    """

    def __init__(self, compiled: Compiled) -> None:
        merge = images.find_merge(compiled.program)
        self._tokens: tuple[int, ...] = () if merge is None else merge.tokens
        self._encoder = None if merge is None else compiled.image_encoder
        self.names = () if self._encoder is None else tuple(s.name for s in self._encoder.inputs)
        self._used: WeakValueDictionary[bytes, Features] = WeakValueDictionary()

    def of_prompt(
        self, prompt: Sequence[int], values: Mapping[str, Tensor] | None
    ) -> PromptImages | None:
        """The images of a prompt; None if it has none.

        Args:
            prompt: token ids.
            values: image inputs by name, as the model's processor makes them.

        Raises:
            InputError: the model takes no images, an input is missing, unknown or of a wrong
                shape, or the prompt has more or fewer image tokens than the images need.
            Error: the encoder failed.
        """
        if self._encoder is None:
            if values is not None:
                raise InputError(
                    "argument 'images' is given, but the model writes no images over its tokens",
                    "use a vision-language model that was captured with images",
                )
            return None
        places = np.flatnonzero(np.isin(np.asarray(prompt, dtype=np.int64), self._tokens))
        if values is None:
            self._check_count(len(places), 0)
            return None
        features = self._features(self._encoder, values)
        self._check_count(len(places), len(features.values))
        return PromptImages(features, places)

    def _features(self, encoder: Program, values: Mapping[str, Tensor]) -> Features:
        self._check(encoder, values)
        key = _key_of(values)
        features = self._used.get(key)
        if features is None:
            given = {name: value.to(encoder.device) for name, value in values.items()}
            try:
                features = Features(images.encode(encoder, given).contiguous())
            except Exception as error:
                raise as_error(error, "encoding the images of a prompt") from error
            self._used[key] = features
        return features

    def _check(self, encoder: Program, values: Mapping[str, Tensor]) -> None:
        """Refuse what cannot be an input at all; the rest is checked as images are encoded."""
        for name, value in values.items():
            if name not in self.names:
                known = ", ".join(self.names)
                raise InputError(f"there is no image input {name!r}", f"give: {known}")
            if not isinstance(value, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                kind = type(value).__name__
                raise InputError(f"image input {name!r} is a {kind}", "give a tensor")
            wanted = encoder.input(name).shape
            if not _fits(value.shape, wanted):
                sizes = " x ".join(["images", *map(str, wanted[1:])])
                raise InputError(
                    f"image input {name!r} has shape {tuple(value.shape)}", f"give it as [{sizes}]"
                )

    def _check_count(self, tokens: int, features: int) -> None:
        if tokens != features:
            raise InputError(
                f"the prompt has {tokens} image tokens, its images have {features} features",
                f"write the token {self._tokens[0]} once per feature where the images belong, as "
                "the model's processor does",
            )


def _fits(shape: Sequence[int], wanted: Sequence[int | str]) -> bool:
    """Whether a value has these sizes behind the first one, and is not empty."""
    if len(shape) != len(wanted) or 0 in shape:
        return False
    sizes = zip(shape[1:], wanted[1:], strict=True)
    return all(isinstance(size, str) or found == size for found, size in sizes)


def _key_of(values: Mapping[str, Tensor]) -> bytes:
    """Equal keys, equal images."""
    digest = hashlib.blake2b(digest_size=DIGEST)
    for name, value in sorted(values.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(bytes_of(value).data)
    return digest.digest()
