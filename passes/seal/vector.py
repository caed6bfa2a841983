"""Steering vectors on disk: a safetensors file that states what its vector means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from fxgraft.errors import InputError

Convention = Literal["E-RT", "RT-E"]
_CONVENTIONS: tuple[Convention, ...] = ("E-RT", "RT-E")


@dataclass(frozen=True)
class SteeringVector:
    """The mean hidden state that opens one kind of thought minus that of another.

    Attributes:
        vector: float [D].
        convention: ``"E-RT"``: execution minus reflection and transition (the paper's sign);
            ``"RT-E"``: the reverse (the sign of the authors' files).
        layer: index L of the block whose input the vector was taken from; the number of blocks
            stands for the stream after the final norm.
        model: name of the model it was taken from.

    Source: SEAL, arXiv 2504.07986, section 3.
    """

    vector: Tensor
    convention: Convention
    layer: int
    model: str

    @property
    def direction(self) -> Tensor:
        """The vector in the paper's sign, E minus RT."""
        return self.vector if self.convention == "E-RT" else -self.vector

    def save(self, path: Path) -> Path:
        """Write the vector and what it means to a safetensors file."""
        metadata = {
            "format": "fxgraft.seal",
            "convention": self.convention,
            "layer": str(self.layer),
            "model": self.model,
            "hidden_size": str(self.vector.shape[0]),
        }
        cast(Any, safetensors_torch).save_file({"vector": self.vector.contiguous()}, path, metadata)
        return path

    @staticmethod
    def load(path: Path) -> SteeringVector:
        """Read a vector file.

        Raises:
            InputError: it cannot be read, has no vector, has values that are not finite, or does
                not state its convention and layer.
        """
        place = f"pass 'seal': field 'vector': {path}"
        try:
            with cast(Any, safe_open)(path, framework="pt") as file:
                metadata = cast("dict[str, str]", file.metadata() or {})
                vector = cast(Tensor, file.get_tensor("vector"))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{place} cannot be used: {error}",
                "give a safetensors file with a tensor 'vector'; SteeringVector.save writes one",
            ) from error
        if vector.dim() != 1 or not bool(torch.isfinite(vector).all()):
            raise InputError(
                f"{place} holds a tensor of shape {list(vector.shape)} or values that are not "
                "finite (NaN or infinite)",
                "extract the vector again",
            )
        convention = metadata.get("convention")
        if convention not in _CONVENTIONS or not metadata.get("layer", "").isdigit():
            raise InputError(
                f"{place} does not state its sign convention and layer (its metadata: {metadata})",
                "write 'convention' ('E-RT' or 'RT-E') and 'layer' into the file's metadata",
            )
        return SteeringVector(vector, convention, int(metadata["layer"]), metadata.get("model", ""))
