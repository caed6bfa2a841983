"""The offline stage of ``flow``: from a model and text to patterns and pruned weights."""

from __future__ import annotations

from typing import Any, ClassVar

from fxgraft.errors import InputError
from fxgraft.offline import Made, OfflineStage, Workspace
from fxgraft.passes.flow import criteria, report
from fxgraft.passes.flow.adapters import require_peft
from fxgraft.passes.flow.budget import Selection
from fxgraft.passes.flow.criteria import Assignment
from fxgraft.passes.flow.recovery import recover
from fxgraft.passes.flow.settings import FlowSettings
from fxgraft.passes.flow.stream import Run
from fxgraft.passes.flow.study import Study
from fxgraft.program import Program


class FlowCalibration(FlowSettings, OfflineStage):
    """Choose N:M layer by layer and prune (FLOW, arXiv 2504.14365)."""

    role: ClassVar[str] = OfflineStage.role

    def run(self, program: Program, work: Workspace) -> Made:
        """Measure, choose, prune, hold the result against one N:M for all layers, and recover."""
        return select_and_prune(program, self, work)


def select_and_prune(program: Program, settings: FlowSettings, work: Workspace) -> Made:
    """Everything the pass needs, computed from the settings' data.

    Raises:
        InputError: model, settings and data do not fit together, or hold NaN.
    """
    if settings.recovery.steps:
        require_peft()
    study = Study.of(program, settings, work)
    selection, assignment = study.select(work)
    run = study.prune(assignment, "prune", work)
    chosen, words, rival = settings.criterion, "", None
    if settings.criterion != "uniform":
        selection, assignment, run, rival, words = _guard(study, selection, assignment, run, work)
        chosen = "uniform" if run is rival else chosen
    pruned, recovered = run, None
    if settings.recovery.steps and run.tensors:
        recovered = recover(study, run, work)
        run = recovered.run
    results: dict[str, Any] = {
        "asked": selection.asked,
        "sparsity": selection.sparsity,
        "exact": selection.is_exact,
        "chosen": chosen,
        "guard": words,
        "loss": {
            "dense": study.dense_loss,
            "pruned": pruned.loss,
            "uniform": rival.loss if rival is not None else None,
            "recovered": recovered.loss if recovered is not None else None,
        },
        "recovery": recovered.describe(pruned.loss) if recovered is not None else None,
        "layers": report.layers(study, assignment),
        "blocks": report.blocks(study),
        "left": study.found.left,
        "seconds": study.seconds,
    }
    tensors = {**run.tensors, **report.statistics(study)}
    if recovered is not None:
        tensors["recovery.losses"] = recovered.losses
    texts = {"picture.svg": report.picture(results)}
    return Made(tensors, results, report.summary(results, selection), texts)


def _guard(
    study: Study, selection: Selection, assignment: Assignment, run: Run, work: Workspace
) -> tuple[Selection, Assignment, Run, Run | None, str]:
    """Take one pattern for all layers where it does no worse at the same sparsity."""
    try:
        plain, same = criteria.uniform(study.groups(), study.settings.budget)
    except InputError:
        return selection, assignment, run, None, "no single N:M reaches this sparsity"
    if plain.sparsity != selection.sparsity:
        words = f"no single N:M has this sparsity: the nearest above is {plain.sparsity:g}"
        return selection, assignment, run, None, words
    rival = study.prune(same, "uniform", work)
    if run.loss < rival.loss:
        return selection, assignment, run, rival, ""
    words = f"criterion {study.settings.criterion!r} did no better than uniform, which was taken"
    return plain, same, rival, rival, words
