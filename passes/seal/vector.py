"""Steering vectors on disk: a file or an artifact that states what its vector means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from fxgraft import artifact
from fxgraft.errors import InputError
from fxgraft.program import Program

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
        model: source of the model it was taken from, empty if not known.
        fingerprint: of that model's weights (``fxgraft.artifact.fingerprint``), empty if not known.
        hidden_norm: mean Euclidean norm of the hidden states that it was taken from, 0 if not
            known.

    Source: SEAL, arXiv 2504.07986, section 3.
    """

    vector: Tensor
    convention: Convention
    layer: int
    model: str
    fingerprint: str = ""
    hidden_norm: float = 0.0

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
            "fingerprint": self.fingerprint,
            "hidden_norm": repr(self.hidden_norm),
            "hidden_size": str(self.vector.shape[0]),
        }
        cast(Any, safetensors_torch).save_file({"vector": self.vector.contiguous()}, path, metadata)
        return path

    @staticmethod
    def load(path: Path | str, layer: int | None = None) -> SteeringVector:
        """Read a vector file, or the artifact that ``fxgraft calibrate seal`` wrote.

        Args:
            path: the file or folder.
            layer: which of an artifact's vectors; None, or a layer that it has none of, takes the
                one that separates best.

        Raises:
            InputError: it cannot be read, has no vector, has values that are not finite, or does
                not state its convention and layer.
        """
        path = Path(path).expanduser()
        found = _of_artifact(path, layer) if path.is_dir() else _of_file(path)
        vector = found.vector
        if vector.dim() != 1 or not bool(torch.isfinite(vector).all()):
            raise InputError(
                f"{_place(path)} holds a tensor of shape {list(vector.shape)} or values that are "
                "not finite (NaN or infinite)",
                "extract the vector again",
            )
        return found

    def check(self, program: Program, path: Path) -> None:
        """Refuse a vector that was taken from another model.

        The model is the same if it has the same source, or the same weights. Where neither is
        known on both sides (a file without them, weights that passes have changed), the vector is
        taken.

        Raises:
            InputError: it is another model.
        """
        source = str(program.origin.get("source") or "")
        named = bool(self.model and source)
        if named and Path(self.model).name.casefold() == Path(source).name.casefold():
            return
        weighed = bool(self.fingerprint) and not program.history
        if weighed and artifact.fingerprint(program) == self.fingerprint:
            return
        if named or weighed:
            raise InputError(
                f"{_place(path)} was taken from model {self.model or 'with other weights'!r}, "
                f"this one is {source or 'with other weights'!r}",
                "use a vector that was extracted from this model, or set the field 'any_model'",
            )


def norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension, [...] from [..., D]."""
    return x.square().sum(-1).sqrt()


def _place(path: Path) -> str:
    return f"pass 'seal': field 'vector': {path}"


def _of_artifact(path: Path, layer: int | None) -> SteeringVector:
    found = artifact.read(path, "seal")
    tensors, results = found.tensors(), found.results
    best = int(results["layer"])
    chosen = layer if layer is not None and f"layer_{layer}" in tensors else best
    facts = results["layers"][str(chosen)]
    return SteeringVector(
        tensors[f"layer_{chosen}"],
        "E-RT",
        chosen,
        str(found.model["source"] or ""),
        str(found.model["fingerprint"]),
        float(facts["hidden_norm"]),
    )


def _of_file(path: Path) -> SteeringVector:
    try:
        with cast(Any, safe_open)(path, framework="pt") as file:
            metadata = cast("dict[str, str]", file.metadata() or {})
            vector = cast(Tensor, file.get_tensor("vector"))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{_place(path)} cannot be used: {error}",
            "give a safetensors file with a tensor 'vector' (SteeringVector.save writes one), or "
            "the folder that `fxgraft calibrate seal` wrote",
        ) from error
    convention = metadata.get("convention")
    if convention not in _CONVENTIONS or not metadata.get("layer", "").isdigit():
        raise InputError(
            f"{_place(path)} does not state its sign convention and layer (its metadata: "
            f"{metadata})",
            "write 'convention' ('E-RT' or 'RT-E') and 'layer' into the file's metadata",
        )
    return SteeringVector(
        vector,
        convention,
        int(metadata["layer"]),
        metadata.get("model", ""),
        metadata.get("fingerprint", ""),
        float(metadata.get("hidden_norm", 0)),
    )
