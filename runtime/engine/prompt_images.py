"""Features of a prompt's images: kept with their request and given out chunk by chunk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DIGEST = 16
"""Bytes of a hash."""


@dataclass(frozen=True, eq=False)
class Features:
    """What an image encoder makes of the images of one call.

    Attributes:
        values: [N, D] on the model's device, one row per image token.
    """

    values: Tensor

    @cached_property
    def digests(self) -> npt.NDArray[np.uint8]:
        """A hash of each row, uint8 [N, 16]; waits for the device."""
        rows = bytes_of(self.values)
        hashed = b"".join(hashlib.blake2b(row, digest_size=DIGEST).digest() for row in rows)
        return np.frombuffer(hashed, dtype=np.uint8).reshape(-1, DIGEST)


@dataclass(frozen=True, eq=False)
class PromptImages:
    """The images of one prompt.

    Attributes:
        features: of all its image tokens, in order.
        places: where these tokens stand in the prompt, int64 [N], ascending.
    """

    features: Features
    places: npt.NDArray[np.int64]

    def embeds(self, start: int, end: int) -> Tensor:
        """``image_embeds`` [1, S, D] of tokens ``start`` to ``end``; zeros where no image is."""
        rows = self._rows(start, end)
        values = self.features.values
        embeds = values.new_zeros(1, end - start, values.shape[1])
        # An image is one run of tokens, or a few: each is copied without an index on the device.
        places = self.places[rows] - start
        breaks = np.flatnonzero(np.diff(places) != 1) + 1
        first = rows.start
        for run in np.split(places, breaks):
            if run.size:
                embeds[0, run[0] : run[-1] + 1] = values[first : first + run.size]
                first += run.size
        return embeds

    def content(self, start: int, end: int) -> bytes:
        """What tells the images of tokens ``start`` to ``end`` from others; empty for text."""
        return self.features.digests[self._rows(start, end)].tobytes()

    def _rows(self, start: int, end: int) -> slice:
        first, last = np.searchsorted(self.places, [start, end])
        return slice(int(first), int(last))


def bytes_of(value: Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor [N, ...], uint8 [N, M]; waits for the device."""
    flat = value.detach().cpu().contiguous().reshape(len(value), -1)
    return flat.view(torch.uint8).numpy()
