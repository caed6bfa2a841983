"""The artifact of ``fxgraft calibrate dsla``: one trained layer per stage, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fxgraft import artifact
from fxgraft.errors import InputError
from fxgraft.passes.dsla.form import Form
from fxgraft.program import Program

KIND = "dsla"


@dataclass(frozen=True)
class Stages:
    """Layers that were distilled one after the other; every first part of them is a valid model.

    Attributes:
        form: of all layers.
        order: indices of all layers that could be converted, least sensitive first.
        scores: how sensitive each is, in that order.
        layers: index of the layer that each stage trained.
        tensors: of all stages; names begin with ``stage_<number>.``.
    """

    form: Form
    order: list[int]
    scores: list[float]
    layers: list[int]
    tensors: Mapping[str, Tensor]

    @staticmethod
    def read(folder: Path, program: Program) -> Stages:
        """Read an artifact that was made from this model.

        Raises:
            InputError: there is none, or it is of another model.
            SerializationError: it is damaged.
        """
        found = artifact.read(folder, KIND)
        if found.model["fingerprint"] != artifact.fingerprint(program):
            raise InputError(
                f"the artifact in {folder} was made from another model "
                f"({found.model['source'] or 'given as a module'}), or another pass changed this "
                "one's weights",
                "put dsla in front of passes that change weights, or calibrate on this model",
            )
        results = found.results
        return Stages(
            Form.from_config(found.settings["form"]),
            results["order"],
            results["scores"],
            [stage["layer"] for stage in results["stages"]],
            found.tensors(),
        )

    def parameters(self, layer: int) -> dict[str, Tensor]:
        """Parameters of one layer, see ``Form.initial``."""
        prefix = prefix_of(self.layers.index(layer))
        return {
            name.removeprefix(prefix): value
            for name, value in self.tensors.items()
            if name.startswith(prefix)
        }


def prefix_of(stage: int) -> str:
    """What the names of a stage's tensors begin with."""
    return f"stage_{stage:02d}."


def named(stage: int, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's tensors under their names in the artifact."""
    return {f"{prefix_of(stage)}{name}": value for name, value in parameters.items()}
