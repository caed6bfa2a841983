"""A short training after pruning, which brings back some of what the model lost.

Low-rank adapters are trained so that the pruned model predicts what the dense one predicts: the
loss is KL(dense ‖ pruned) of the next token on the calibration data, without its labels; for
models without next-token loss, the relative squared change of the outputs. Pruned weights stay
frozen and masks as they are; at the end the adapters are folded in, see ``adapters``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import checkpoint as checkpoints

from fxgraft import blockwise
from fxgraft.blockwise import Part, Values
from fxgraft.calibration import Inputs
from fxgraft.errors import NumericError
from fxgraft.offline import Workspace
from fxgraft.passes.flow import adapters
from fxgraft.passes.flow.adapters import AdaptedLayer, Adapters
from fxgraft.passes.flow.settings import Recovery
from fxgraft.passes.flow.stream import Run, evaluate
from fxgraft.passes.flow.study import Study
from fxgraft.program import Program

_STEPS_BETWEEN_CHECKPOINTS = 20
_WARM_UP = 0.05
_LARGEST_GRADIENT = 1.0
_CHECKPOINT = "recovery"
_checkpoint: Any = cast(Any, checkpoints).checkpoint
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Recovered:
    """What a recovery gave.

    Attributes:
        run: the pruned model with adapters folded in; as it was where that did no better.
        loss: on the calibration data, with adapters folded in.
        losses: of the training, float32 [steps].
        parameters: of all adapters.
    """

    run: Run
    loss: float
    losses: Tensor
    parameters: int

    def describe(self, before: float) -> dict[str, Any]:
        """JSON values for the artifact; ``before`` is the loss on the calibration data."""
        return {
            "taken": self.loss < before,
            "adapter_parameters": self.parameters,
            "first_step": float(self.losses[0]),
            "last_step": float(self.losses[-1]),
        }


def recover(study: Study, run: Run, work: Workspace) -> Recovered:
    """Train adapters on a pruned model and fold them in.

    Batches depend on the seed and the step alone, so a run that goes on after a break ends like
    one that was not interrupted.

    Args:
        study: the dense model and the data.
        run: the pruned model, some of whose layers are pruned; it is not changed.
        work: keeps the training's state, and is told of progress.

    Raises:
        InputError: peft is not installed.
        NumericError: loss or gradient are not finite.
    """
    program, units, settings = study.program, study.found.units, study.settings
    made = adapters.make(units, run.tensors, settings.recovery, settings.seed)
    with study.timed("recover"):
        losses = _Training(study, made, settings.recovery).run(work)
    tensors = dict(run.tensors)
    for layer in made.layers:
        tensors |= layer.folded()
    loss = evaluate(program, units, tensors, study.objective)
    count = sum(value.numel() for value in made.parameters.values())
    best = Run(loss, tensors) if loss < run.loss else run
    return Recovered(best, loss, torch.tensor(losses), count)


class _Training:
    """The state of a training: adapters, moments of the optimiser, losses so far."""

    def __init__(self, study: Study, made: Adapters, settings: Recovery) -> None:
        self.study, self.settings = study, settings
        self.parameters = made.parameters
        self.losses: list[float] = []
        self.optimiser = torch.optim.AdamW(
            list(made.parameters.values()), lr=settings.learning_rate, weight_decay=0.0
        )
        by_node = {layer.unit.node: layer for layer in made.layers}
        self.parts = [
            (part, [by_node[node] for node in part.nodes if node in by_node])
            for part in blockwise.parts_of(study.program)
        ]
        batches = study.objective.batches
        self.data = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}

    def run(self, work: Workspace) -> list[float]:
        """Train to the end, from where an earlier run stopped; returns the loss of each step."""
        self._restore(work.find(_CHECKPOINT))
        total = self.settings.steps
        for step in range(len(self.losses), total):
            self.losses.append(self._step(step))
            work.progress(f"recover, loss {self.losses[-1]:.4g}", step + 1, total)
            if (step + 1) % _STEPS_BETWEEN_CHECKPOINTS == 0 or step + 1 == total:
                work.keep(_CHECKPOINT, self._state())
        return self.losses

    def _step(self, step: int) -> float:
        program, objective = self.study.program, self.study.objective
        batch = self._batch(step)
        with torch.no_grad():
            dense = _outputs(program, [(part, []) for part, _ in self.parts], batch)
        with torch.enable_grad():
            loss = objective.distance(_outputs(program, self.parts, batch), dense)
        parameters = list(self.parameters.values())
        differentiate: Any = torch.autograd.grad
        # Layers that no token reached, such as experts, have no gradient.
        gradients = differentiate(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
        size = torch.nn.utils.clip_grad_norm_(parameters, _LARGEST_GRADIENT)
        if not math.isfinite(float(loss.detach()) + float(size)):
            raise NumericError(
                f"pass 'flow': loss or gradient of the recovery are not finite at step {step + 1}",
                "set a smaller learning_rate or alpha in 'recovery'",
            )
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * _rate(step, self.settings.steps)
        self.optimiser.step()  # pyright: ignore[reportUnknownMemberType]
        return float(loss.detach())

    def _batch(self, step: int) -> Inputs:
        """Sequences of the calibration data, drawn without repetition."""
        first = next(iter(self.data.values()))
        length = first.shape[1] if "input_ids" in self.data else 1
        count = min(max(self.settings.tokens // length, 1), first.shape[0])
        generator = torch.Generator().manual_seed(self.study.settings.seed * 1_000_003 + step)
        rows = torch.randperm(first.shape[0], generator=generator)[:count]
        return {name: value[rows.to(value.device)] for name, value in self.data.items()}

    def _state(self) -> dict[str, Tensor]:
        state = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, parameter in self.parameters.items():
            state[name] = parameter.detach()
            for moment in _MOMENTS:
                state[f"{name}.{moment}"] = self.optimiser.state[parameter][moment]
        return state

    def _restore(self, state: Mapping[str, Tensor] | None) -> None:
        if state is None:
            return
        self.losses = cast("list[float]", cast(Any, state["losses"]).tolist())
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[name])
            moments = {m: state[f"{name}.{m}"].to(parameter.device) for m in _MOMENTS}
            self.optimiser.state[parameter] = {
                "step": torch.tensor(float(len(self.losses))), **moments
            }  # fmt: skip


def _rate(step: int, steps: int) -> float:
    """The learning rate's factor: a short rise, then a line to 0."""
    warm = max(round(_WARM_UP * steps), 1)
    return min((step + 1) / warm, (steps - step) / max(steps - warm, 1), 1.0)


def _outputs(
    program: Program, parts: Sequence[tuple[Part, Sequence[AdaptedLayer]]], batch: Inputs
) -> dict[str, Tensor]:
    """The outputs by name; only what crosses between blocks is held for the backward pass."""
    values = blockwise.start(program, batch)
    for part, layers in parts:
        through = partial(_through, program, part, layers)
        if not torch.is_grad_enabled():
            values = through(values)
            continue
        # An early stop is an exception, which would pass for the failure of a node.
        with checkpoints.set_checkpoint_early_stop(False):
            values = _checkpoint(through, values, use_reentrant=False)
    return blockwise.outputs_of(program, values)


def _through(
    program: Program, part: Part, layers: Sequence[AdaptedLayer], values: Values
) -> Values:
    """Run one part with adapted weights; all others are frozen."""
    names = {str(node.target) for node in part.nodes if node.op == "get_attr"}
    weights = {name: program.weight(name).detach() for name in names}
    weights |= {layer.unit.weight: layer.weight(program) for layer in layers}
    return blockwise.run(part, program, values, weights=weights)
