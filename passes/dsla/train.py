"""Training of converted layers inside a frozen model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fxgraft.distances import divergence
from fxgraft.errors import NumericError
from fxgraft.offline import Progress, silent
from fxgraft.passes.dsla.form import Form
from fxgraft.passes.dsla.losses import Match, Separation, match, mean, separation
from fxgraft.passes.dsla.probe import Parameters, Probe, Seen, probe_of, taps
from fxgraft.program import Program

_BETAS = (0.9, 0.95)
_WARM_UP = 0.05
_LAST_RATE = 0.5
_FALL = 0.995


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained; the fields are those of ``DslaDistillation``."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    match: Match
    from_teacher: bool
    separation: float
    separation_kind: Separation
    logits: float
    plateau: int
    seed: int

    def rate(self, step: int) -> float:
        """The learning rate's factor: linear warm-up, then a cosine down to half."""
        warm = max(round(_WARM_UP * self.steps), 1)
        if step < warm:
            return (step + 1) / warm
        share = (step - warm) / max(self.steps - warm, 1)
        return _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Trained:
    """What training gave.

    Attributes:
        parameters: of each layer.
        losses: distance of attention outputs at each step, mean over the layers, float32 [steps].
        separations: likeness of the gates at each step, float32 [steps].
    """

    parameters: list[dict[str, Tensor]]
    losses: Tensor
    separations: Tensor


def train(
    program: Program,
    form: Form,
    before: Sequence[tuple[int, Parameters]],
    new: Sequence[tuple[int, dict[str, Tensor]]],
    ids: Tensor,
    recipe: Recipe,
    title: str = "",
    progress: Progress = silent,
) -> Trained:
    """Train layers until their attention gives what the teacher's gives.

    Batches depend on the seed and the step alone, so that a stage that begins again ends the same.

    Args:
        program: the teacher.
        form: of converted layers.
        before: layers that were converted before, which stay as they are.
        new: layers to train, and their first parameters.
        ids: tokens int64 [N, S].
        recipe: how.
        title: of the progress.
        progress: is told of each step.

    Raises:
        NumericError: the loss is not finite.
    """
    probe = probe_of(program, form, before, new, logits=recipe.logits > 0)
    teacher = None
    if recipe.from_teacher or recipe.logits > 0:
        teacher = taps(program, probe.layers, logits=recipe.logits > 0)
    device = program.device
    parameters = [_trainable(values, device) for _, values in new]
    _match_norms(probe, parameters, _batch(ids, recipe, 0).to(device))
    leaves = [value for values in parameters for value in values.values()]
    optimiser = torch.optim.AdamW(
        leaves, lr=recipe.learning_rate, betas=_BETAS, weight_decay=recipe.weight_decay
    )
    losses: list[Tensor] = []
    alike: list[Tensor] = []
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * recipe.rate(step)
        batch = _batch(ids, recipe, step).to(device)
        loss, distance, likeness = _loss(probe, teacher, parameters, batch, form, recipe)
        optimiser.zero_grad()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        optimiser.step()  # pyright: ignore[reportUnknownMemberType]
        losses.append(distance.detach())
        alike.append(likeness.detach())
        progress(title, step + 1, recipe.steps)
        if recipe.plateau and _is_flat(losses, recipe.plateau):
            progress(title, recipe.steps, recipe.steps)
            break
    curve = torch.stack(losses).float().cpu() if losses else torch.zeros(0)
    if not bool(curve.isfinite().all()):
        raise NumericError(
            f"{title}: the loss is not finite", "set a smaller learning_rate, or write_scale: sqrt"
        )
    done = [{n: v.detach().cpu() for n, v in values.items()} for values in parameters]
    return Trained(done, curve, torch.stack(alike).float().cpu() if alike else curve)


def _trainable(values: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device).clone().requires_grad_() for name, value in values.items()}


@torch.no_grad()
def _match_norms(probe: Probe, parameters: list[dict[str, Tensor]], batch: Tensor) -> None:
    """Begin with outputs that are as large as the teacher's, channel by channel."""
    seen, _ = probe(batch, parameters)
    for values, found in zip(parameters, seen, strict=True):
        if "norm_weight" in values:
            size = found.heads.float().square().mean(dim=(0, 2)).sqrt()
            values["norm_weight"].copy_(size)


def _batch(ids: Tensor, recipe: Recipe, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    return ids[torch.randint(len(ids), (recipe.batch,), generator=generator)]


def _loss(
    probe: Probe,
    teacher: Program | None,
    parameters: list[dict[str, Tensor]],
    batch: Tensor,
    form: Form,
    recipe: Recipe,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the distance of attention outputs in it, and the likeness of gates."""
    seen, logits = probe(batch, parameters)
    targets = [one.teacher for one in seen]
    wanted: Tensor | None = None
    if teacher is not None:
        outputs = cast("tuple[Tensor, ...]", teacher(batch))
        wanted = outputs[-1] if recipe.logits > 0 else None
        if recipe.from_teacher:
            targets = list(outputs[: len(seen)])
    distance = mean([match(s.student, t, recipe.match) for s, t in zip(seen, targets, strict=True)])
    likeness = mean([_likeness(one, form, recipe) for one in seen])
    loss = distance + recipe.separation * likeness
    if logits is not None and wanted is not None:
        loss = loss + recipe.logits * divergence(logits, wanted)
    return loss, distance, likeness


def _likeness(seen: Seen, form: Form, recipe: Recipe) -> Tensor:
    return separation(seen.gate, form.temperature, form.floor, recipe.separation_kind)


def _is_flat(losses: list[Tensor], window: int) -> bool:
    """Whether the last ``window`` steps were hardly better than the ones before."""
    if len(losses) < 2 * window or len(losses) % window:
        return False
    return bool(mean(losses[-window:]) > _FALL * mean(losses[-2 * window : -window]))
