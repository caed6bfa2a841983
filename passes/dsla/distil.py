"""The offline stage of ``dsla``: an order of the layers, and one trained layer after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fxgraft.calibration import token_losses
from fxgraft.errors import InputError
from fxgraft.offline import Made, OfflineStage, Workspace
from fxgraft.passes.dsla import curves, data
from fxgraft.passes.dsla.form import Form
from fxgraft.passes.dsla.losses import Match, Separation
from fxgraft.passes.dsla.probe import hidden_size, student_of
from fxgraft.passes.dsla.sensitivity import ascending, entropy_scores
from fxgraft.passes.dsla.sites import Site, find_sites
from fxgraft.passes.dsla.stages import named
from fxgraft.passes.dsla.train import Recipe, Trained, train
from fxgraft.program import Program

_BATCH = 4


class DslaDistillation(OfflineStage):
    """Rank the layers, then train them one by one (arXiv 2506.09316, sections 3.2 and 3.3).

    In each stage one more layer becomes linear and everything else stays as it is, so that every
    first part of the stages is a model of its own.
    """

    name: ClassVar[str] = "dsla"

    data: tuple[Path, ...] = ()
    """Text files, or safetensors files with `input_ids`; none: the teacher writes its own."""
    tokenizer: str | None = None
    """Model whose tokenizer to use; default the model's own source."""
    generated: int = Field(default=64, ge=2)
    """Sequences that the teacher writes where no data are given."""
    length: int = Field(default=512, ge=2)
    """Tokens per sequence."""
    held_out: int = Field(default=8, ge=1)
    """Sequences at the end of the data that nothing is trained on."""
    form: Form = Form()
    """The form of converted layers."""
    count: int | None = Field(default=None, ge=1)
    """How many layers to train; default those of `fraction`."""
    fraction: float = Field(default=0.5, gt=0, le=1)
    """Share of the layers to train, rounded down."""
    order: Literal["entropy", "loss", "random", "last"] | tuple[int, ...] = "entropy"
    """Which layers come first: low attention entropy, little loss when converted alone (trained
    for `trial_steps`), chance, the last ones, or the given ones."""
    reverse: bool = False
    """Turn the order round."""
    trial_steps: int = Field(default=50, ge=0)
    """Steps of training per layer that the order `loss` allows."""
    joint: bool = False
    """Train all layers at once instead of one after the other."""
    tokens: int = Field(default=400_000, ge=1)
    """Tokens of training per stage."""
    batch: int = Field(default=4, ge=1)
    """Sequences per step."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Of AdamW, after a linear warm-up over the first 5 % of the steps; falls to half of it."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW."""
    match: Match = "mse"
    """Distance of attention outputs: relative squared error, or divergence of features."""
    target: Literal["local", "global"] = "local"
    """The teacher's attention on the student's own stream, or on the teacher's."""
    separation: float = Field(default=0.01, ge=0)
    """Weight of the likeness of the states' gates."""
    separation_kind: Separation = "centred"
    """How likeness is measured."""
    logits: float = Field(default=0.0, ge=0)
    """Weight of the divergence of the final logits."""
    plateau: int = Field(default=0, ge=0)
    """End a stage when its loss has not fallen by 0.5 % for so many steps; 0 never."""
    seed: int = 0
    """Of initial weights, of the data's order, and of what the teacher writes."""

    @property
    def steps(self) -> int:
        """Steps per stage."""
        return max(self.tokens // (self.batch * self.length), 1)

    def run(self, program: Program, work: Workspace) -> Made:
        """Rank the layers and train them; see ``OfflineStage.run``."""
        sites, reasons = find_sites(program)
        if not sites:
            raise InputError(
                f"no layer of this model can be converted: {next(iter(reasons.values()), '')}",
                "use a model with causal softmax attention without windows",
            )
        ids = work.part("tokens", lambda: {"input_ids": self._sequences(program)})["input_ids"]
        if len(ids) <= self.held_out:
            raise InputError(
                f"the data give {len(ids)} sequences of {self.length} tokens, and {self.held_out} "
                "are held out",
                "give more data, or a smaller 'length' or 'held_out'",
            )
        learn, held = ids[: -self.held_out], ids[-self.held_out :]
        order, scores = self._order(program, sites, learn, held, work)
        chosen = [
            next(s for s in sites if s.layer == layer) for layer in order[: self._count(order)]
        ]
        trained = self._train(program, chosen, learn, work)
        losses = self._held_out(program, trained, held, work)
        return self._made(order, scores, trained, losses)

    def _sequences(self, program: Program) -> Tensor:
        if self.data:
            return data.from_files(self.data, program, self.length, self.tokenizer)
        return data.generated(program, self.generated, self.length, self.seed)

    def _count(self, order: Sequence[int]) -> int:
        count = self.count if self.count is not None else math.floor(self.fraction * len(order))
        if not 0 < count <= len(order):
            raise InputError(
                f"{count} layers are to be trained, and {len(order)} can be",
                "set 'count' or 'fraction' so that there is at least one stage",
            )
        return count

    def _order(
        self, program: Program, sites: Sequence[Site], learn: Tensor, held: Tensor, work: Workspace
    ) -> tuple[list[int], list[float]]:
        """All layers, least sensitive first, and their scores in that order."""
        layers = [site.layer for site in sites]
        if isinstance(self.order, tuple):
            wrong = sorted(set(self.order) - set(layers))
            if wrong or len(set(self.order)) < len(self.order):
                raise InputError(
                    f"'order' names layers {wrong or list(self.order)}, which are unknown or "
                    "named twice",
                    f"the layers are: {', '.join(map(str, layers))}",
                )
            scores = {layer: float(place) for place, layer in enumerate(self.order)}
        else:
            found = work.part(
                "order", lambda: {"scores": self._scores(program, sites, learn, held)}
            )
            values = [float(value) for value in found["scores"]]
            scores = dict(zip(layers, values, strict=True))
        order = ascending(scores)[:: -1 if self.reverse else 1]
        return order, [scores[layer] for layer in order]

    def _scores(
        self, program: Program, sites: Sequence[Site], learn: Tensor, held: Tensor
    ) -> Tensor:
        layers = [site.layer for site in sites]
        if self.order == "entropy":
            found = entropy_scores(program, sites, learn[:16])
            return torch.tensor([found[layer] for layer in layers], dtype=torch.float64)
        if self.order == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return torch.rand(len(layers), generator=generator, dtype=torch.float64)
        if self.order == "last":
            return -torch.tensor(layers, dtype=torch.float64)
        recipe = self._recipe(self.trial_steps)
        rows = [train(program, self.form, (), self._new([site]), learn, recipe) for site in sites]
        losses = [_loss(program, self.form, [(s.layer, r.parameters[0])], held)
                  for s, r in zip(sites, rows, strict=True)]  # fmt: skip
        return torch.tensor(losses, dtype=torch.float64)

    def _new(self, sites: Sequence[Site]) -> list[tuple[int, dict[str, Tensor]]]:
        return [(s.layer, self.form.initial(s, hidden_size(s), self.seed)) for s in sites]

    def _recipe(self, steps: int) -> Recipe:
        return Recipe(
            steps=steps, batch=self.batch, learning_rate=self.learning_rate,
            weight_decay=self.weight_decay, match=self.match, from_teacher=self.target == "global",
            separation=self.separation, separation_kind=self.separation_kind, logits=self.logits,
            plateau=self.plateau, seed=self.seed,
        )  # fmt: skip

    def _train(
        self, program: Program, chosen: Sequence[Site], learn: Tensor, work: Workspace
    ) -> list[tuple[int, dict[str, Tensor]]]:
        """Parameters and loss curves of each stage; the names of the latter begin with ``_``."""
        recipe = self._recipe(self.steps)
        stages = [list(chosen)] if self.joint else [[site] for site in chosen]
        done: list[tuple[int, dict[str, Tensor]]] = []
        for number, sites in enumerate(stages):
            title = f"stage {number + 1} of {len(stages)}: layer " + ", ".join(
                str(site.layer) for site in sites
            )
            before = [(layer, _parameters(tensors)) for layer, tensors in done]

            def compute(
                title: str = title,
                before: Sequence[tuple[int, dict[str, Tensor]]] = before,
                sites: Sequence[Site] = sites,
            ) -> dict[str, Tensor]:
                new = self._new(sites)
                made = train(program, self.form, before, new, learn, recipe, title, work.progress)
                return _packed(made)

            part = work.part(f"stage_{number:02d}", compute)
            done += [(s.layer, _unpacked(part, place)) for place, s in enumerate(sites)]
        return done

    def _held_out(
        self,
        program: Program,
        trained: Sequence[tuple[int, Mapping[str, Tensor]]],
        held: Tensor,
        work: Workspace,
    ) -> list[float]:
        """Loss on held-out text of the teacher, then after each stage."""
        stages = [(layer, _parameters(tensors)) for layer, tensors in trained]
        found: list[float] = []
        for count in range(len(stages) + 1):
            work.progress("held-out text", count, len(stages) + 1)
            found.append(_loss(program, self.form, stages[:count], held))
        work.progress("held-out text", len(stages) + 1, len(stages) + 1)
        return found

    def _made(
        self,
        order: list[int],
        scores: list[float],
        trained: Sequence[tuple[int, dict[str, Tensor]]],
        losses: list[float],
    ) -> Made:
        tensors: dict[str, Tensor] = {}
        stages: list[dict[str, float | int]] = []
        for number, (layer, found) in enumerate(trained):
            tensors |= named(number, _parameters(found))
            curve, alike = found["_loss"], found["_separation"]
            stages.append({
                "layer": layer, "steps": len(curve), "first_loss": float(curve[0]),
                "last_loss": float(curve[-max(len(curve) // 20, 1) :].mean()),
                "first_separation": float(alike[0]), "last_separation": float(alike[-1]),
                "held_out_loss": losses[number + 1],
            })  # fmt: skip
        results = {
            "order": order, "scores": scores, "teacher_loss": losses[0], "stages": stages,
        }  # fmt: skip
        lines = [f"teacher: loss {losses[0]:.4f}, perplexity {math.exp(losses[0]):.2f}"]
        lines += [
            f"layer {stage['layer']}: attention loss {stage['first_loss']:.3f} → "
            f"{stage['last_loss']:.3f}, held-out perplexity {math.exp(stage['held_out_loss']):.2f}"
            for stage in stages
        ]
        plot = curves.draw({f"layer {layer}": found["_loss"] for layer, found in trained})
        return Made(tensors, results, lines, {"losses.svg": plot})


def _packed(made: Trained) -> dict[str, Tensor]:
    found = {"_loss": made.losses, "_separation": made.separations}
    for place, parameters in enumerate(made.parameters):
        found |= {f"{place}.{name}": value for name, value in parameters.items()}
    return found


def _unpacked(part: Mapping[str, Tensor], place: int) -> dict[str, Tensor]:
    prefix = f"{place}."
    own = {n.removeprefix(prefix): value for n, value in part.items() if n.startswith(prefix)}
    return {**own, "_loss": part["_loss"], "_separation": part["_separation"]}


def _parameters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith("_")}


@torch.no_grad()
def _loss(
    program: Program, form: Form, trained: Sequence[tuple[int, Mapping[str, Tensor]]], ids: Tensor
) -> float:
    """Mean loss per token with these layers converted."""
    student = student_of(program, form, trained)
    place = student.outputs.index("logits")
    parts = data.batches(ids.to(program.device), _BATCH)
    sums = [float(token_losses(student(part)[place], part).mean()) * len(part) for part in parts]
    return sum(sums) / len(ids)
