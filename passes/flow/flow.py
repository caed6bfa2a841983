"""The pass ``flow``: linear layers keep N of every M weights, chosen layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from fxgraft import artifact
from fxgraft.artifact import fingerprint_of
from fxgraft.errors import InputError
from fxgraft.offline import OfflineStage, Workspace
from fxgraft.passes.flow.adapters import require_peft
from fxgraft.passes.flow.report import NOT_TAKEN
from fxgraft.passes.flow.rewrite import rewrite
from fxgraft.passes.flow.settings import FlowSettings
from fxgraft.passes.flow.stage import FlowCalibration, select_and_prune
from fxgraft.passes.flow.study import find
from fxgraft.passes.flow.units import Unit
from fxgraft.program import Program
from fxgraft.transform import Effect, Pass


class Flow(FlowSettings, Pass):
    """Prune linear layers to N of every M weights, chosen layer by layer (arXiv 2504.14365).

    Masks come from an artifact of ``fxgraft calibrate flow``, or are computed from ``data`` while
    the pass runs. Pruned layers become ``fxgraft::nm_linear``.
    """

    role: ClassVar[str] = Pass.role
    effect: ClassVar[Effect] = Effect.BEHAVIOUR
    requires: ClassVar[frozenset[str]] = frozenset({"stateless", "dense_weights"})
    removes: ClassVar[frozenset[str]] = frozenset({"dense_weights"})
    looks_for: ClassVar[str] = "linear layers inside blocks"
    offline: ClassVar[type[OfflineStage] | None] = FlowCalibration

    artifact: Path | None = None
    """Folder that `fxgraft calibrate flow` made; settings given beside it must be its own."""

    def neutral(self) -> Flow:
        """Prune nothing."""
        return self.model_copy(update={"budget": 0.0, "artifact": None})

    def precheck(self, program: Program) -> None:
        """Refuse settings, an artifact or data that do not fit the model."""
        if self.budget == 0 and self.artifact is None:
            return
        if self.artifact is not None:
            _read(self.artifact, self._given())
            return
        find(program, self)
        if self.recovery.steps:
            require_peft()
        if not self.data:
            raise InputError(
                "pass 'flow' has neither an artifact nor calibration data",
                "set 'artifact' to a folder made by fxgraft calibrate flow, or 'data' to files",
            )

    def run(self, program: Program) -> list[str]:
        """Replace the chosen layers."""
        if self.budget == 0 and self.artifact is None:
            return []
        if self.artifact is None:
            made = select_and_prune(program, self, Workspace())
            found = find(program, self)
            tensors, lines = made.tensors, made.summary
        else:
            stored = _read(self.artifact, self._given())
            settings = FlowCalibration.from_config(stored.settings)
            found = find(program, settings)
            _check_weights(program, found.units, stored.results)
            tensors, lines = stored.tensors(), _describe(stored.results)
        zeroed = rewrite(program, found.units, tensors)
        note = f"{len(zeroed)} weights stay dense tensors with zeros"
        return [*lines, note] if zeroed else lines

    def _given(self) -> dict[str, Any]:
        config = self.config()
        return {key: config[key] for key in self.model_fields_set if key != "artifact"}


def _read(folder: Path, given: dict[str, Any]) -> artifact.Artifact:
    stored = artifact.read(folder, "flow")
    for key, value in given.items():
        if value != stored.settings.get(key):
            raise InputError(
                f"pass 'flow': {key!r} is {value!r}, and {folder} was made with "
                f"{stored.settings.get(key)!r}",
                "leave the setting out, or calibrate again",
            )
    return stored


def _check_weights(program: Program, units: tuple[Unit, ...], results: dict[str, Any]) -> None:
    """Check that the artifact was made from these weights.

    Raises:
        InputError: names the first weight that differs.
    """
    here = {unit.weight: unit for unit in units}
    for entry in results["layers"]:
        name = entry["weight"]
        if name not in here or fingerprint_of(program.weight(name)) != entry["fingerprint"]:
            reason = "other values or shape" if name in here else "no such layer"
            raise InputError(
                f"pass 'flow': the artifact was made from another model: {name!r} has {reason} here"
                if name in here
                else f"pass 'flow': the artifact prunes {name!r}, and there is {reason} here",
                "apply flow before passes that merge or change weights, or calibrate on the model "
                "as it is here",
            )


def _describe(results: dict[str, Any]) -> list[str]:
    exact = "as asked" if results["exact"] else f"asked {results['asked']:g}"
    lines = [f"sparsity {results['sparsity']:.6g}, {exact}; {results['chosen']} chosen"]
    lines += [results["guard"]] if results["guard"] else []
    recovery = results.get("recovery")
    if recovery is None:
        return lines
    loss = results["loss"]
    words = f"calibration loss {loss['pruned']:.4g}, {loss['recovered']:.4g} after recovery"
    return [*lines, words if recovery["taken"] else NOT_TAKEN]
