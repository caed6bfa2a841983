"""What pruning should not raise: next-token loss, or the change of the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxgraft import facts
from fxgraft.calibration import Inputs, token_losses
from fxgraft.distances import divergence
from fxgraft.kernels.spec import spec_of
from fxgraft.program import Program


@dataclass
class Objective:
    """A loss over calibration batches.

    Attributes:
        batches: the inputs.
        is_causal: the loss is the mean cross-entropy of the next token, in nats. Otherwise it is
            the squared change of the outputs over their squared size.
        dense: outputs of the unpruned model by batch, for the second kind.
    """

    batches: Sequence[Inputs]
    is_causal: bool
    dense: list[dict[str, Tensor]] = field(default_factory=list[dict[str, Tensor]])

    @staticmethod
    def of(program: Program, batches: Sequence[Inputs]) -> Objective:
        """The loss that fits a model."""
        mixers = [mixer for layer in program.layers for mixer in layer.mixers]
        specs = [(mixer, spec_of(mixer)) for mixer in mixers]
        looks_ahead = any(spec is not None and spec.causal(mixer) is False for mixer, spec in specs)
        has_text = all("input_ids" in batch for batch in batches)
        return Objective(
            batches, "causal_lm" in facts.facts(program) and not looks_ahead and has_text
        )

    def note(self, outputs: Mapping[str, Tensor]) -> None:
        """Remember the unpruned model's outputs of the next batch, where they are needed."""
        if not self.is_causal:
            self.dense.append(_floating(outputs))

    def evaluate(self, index: int, outputs: Mapping[str, Tensor]) -> tuple[float, float]:
        """The loss of a batch as a sum, and what to divide it by."""
        if self.is_causal:
            losses = token_losses(outputs["logits"], self.batches[index]["input_ids"])
            return float(losses.double().sum()), losses.numel()
        wanted, got = self.dense[index], _floating(outputs)
        changes = [(got[name].double() - value.double()) for name, value in wanted.items()]
        size = sum(float(value.double().square().sum()) for value in wanted.values())
        return sum(float(change.square().sum()) for change in changes), size

    def distance(self, outputs: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> Tensor:
        """How far outputs are from the unpruned model's, a differentiable scalar.

        The divergence KL(dense ‖ outputs) of the next token, mean over tokens, or the squared
        change of the outputs over their squared size.
        """
        if self.is_causal:
            return divergence(outputs["logits"], dense["logits"])
        wanted, got = _floating(dense), _floating(outputs)
        size = torch.stack([value.float().square().sum() for value in wanted.values()]).sum()
        changes = [(got[name].float() - value.float()) for name, value in wanted.items()]
        return torch.stack([change.square().sum() for change in changes]).sum() / size

    def probe(self, index: int, outputs: Mapping[str, Tensor], seed: int) -> Tensor:
        """A scalar whose gradient, squared, tells how the loss curves.

        The summed next-token loss (its gradient gives the empirical Fisher information), or a
        random signed sum of the outputs (whose squared derivative is, in the mean, the squared
        change of the outputs).
        """
        if self.is_causal:
            return token_losses(outputs["logits"], self.batches[index]["input_ids"]).sum()
        generator = torch.Generator().manual_seed(seed + index)
        parts: list[Tensor] = []
        for value in _floating(outputs).values():
            signs = torch.randint(0, 2, value.shape, generator=generator).to(value.device) * 2 - 1
            parts.append((value.float() * signs).sum())
        return torch.stack(parts).sum()


def _floating(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in outputs.items() if value.is_floating_point()}
