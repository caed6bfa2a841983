"""What the pass and its offline stage can be told."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fxgraft.calibration import Choice
from fxgraft.errors import InputError
from fxgraft.passes.flow.patterns import Pattern, candidates
from fxgraft.settings import Settings

# The numbers of kept weights among which the published program chooses.
_PUBLISHED = (2, 4, 8)


class Recovery(BaseModel):
    """A short training of low-rank adapters behind the masks; see ``recovery``."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    steps: int = Field(default=0, ge=0)
    """Steps of training; 0 trains nothing."""
    rank: int = Field(default=8, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(default=16.0, gt=0.0)
    """Adapters count alpha / rank times."""
    learning_rate: float = Field(default=1e-3, gt=0.0)
    """The highest; it rises over the first twentieth of the steps, then falls in a line to 0."""
    tokens: int = Field(default=4096, ge=1)
    """Tokens of a step: as many of the calibration sequences as they fill, one at least."""


class FlowSettings(Settings):
    """Which layers are pruned, by how much, and from which data that is decided."""

    name: ClassVar[str] = "flow"

    budget: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Share of the prunable parameters to prune; 0 changes nothing."""
    m: tuple[int, ...] = (4, 8)
    """Group widths M to choose from: 2, 4, 8, 16, 32."""
    n: tuple[int, ...] | None = None
    """Kept weights N to choose from; default 1 to M (criterion `flow`: 2, 4, 8, as published)."""
    granularity: Literal["projection", "block"] = "projection"
    """Choose N:M for each linear layer, or one for all layers of a block."""
    criterion: Literal["loss", "flow", "figure", "uniform"] = "loss"
    """By the estimated rise of the loss, as FLOW's released code, as its figure, or one for all."""
    update: Literal["none", "hessian"] = "none"
    """Leave kept weights alone, or make up for pruned ones (SparseGPT)."""
    threshold: float = Field(default=5.0, gt=0.0)
    """A weight is an outlier if its score is so many times its block's mean."""
    keep_dense: tuple[str, ...] = ()
    """Indices of blocks, or patterns of module paths, left dense; counted as sparsity 0."""
    include: tuple[str, ...] = ()
    """Patterns of module paths to prune although they are left alone otherwise."""
    pad: bool = False
    """Fill the last group of a layer whose inputs M does not divide."""
    data: tuple[Path, ...] = ()
    """Calibration data: text (.txt, .md, .jsonl) or inputs (.safetensors)."""
    samples: int = Field(default=64, ge=1)
    """Calibration sequences."""
    length: int = Field(default=2048, ge=2)
    """Tokens of a sequence."""
    seed: int = Field(default=0, ge=0)
    """Of the places where sequences are cut."""
    probes: int = Field(default=2, ge=1)
    """Batches of the calibration data on which criterion `loss` estimates the rise."""
    recovery: Recovery = Recovery()
    """Train low-rank adapters after pruning and fold them into the kept weights; needs peft."""
    tokenizer: str | None = None
    """Model whose tokenizer to use; default the Program's own source."""

    def model_post_init(self, context: object) -> None:
        """Refuse impossible patterns and budgets before any work.

        Raises:
            InputError: names the field, and for a budget the range that can be reached.
        """
        patterns = self.patterns
        highest = max(float(pattern.sparsity) for pattern in patterns)
        if self.budget > highest:
            raise InputError(
                f"pass 'flow': budget {self.budget:g} cannot be reached: the candidates "
                f"{', '.join(map(str, patterns))} reach 0 to {highest:g}",
                "lower 'budget', or allow smaller numbers in 'n'",
            )

    @property
    def patterns(self) -> list[Pattern]:
        """The candidates."""
        kept = _PUBLISHED if self.n is None and self.criterion == "flow" else self.n
        return candidates(self.m, kept)

    @property
    def choice(self) -> Choice:
        """Which inputs to take from the data."""
        return Choice(self.samples, self.length, self.seed, self.tokenizer)
