"""The form of a converted layer: its gates, states and read-out, and their initial values."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.passes.dsla.sites import Site
from fxgraft.settings import Settings

Half = tuple[float, float]
_LONGEST, _SHORTEST = 16384.0, 4.0
# Dual-state layers: states of history and of recency do not overlap.
_DUAL: tuple[Half, ...] = ((512.0, _LONGEST), (_SHORTEST, 128.0))
_GATE_STD = 0.01
# Read by matrix products, and so of the model's dtype; the rest stays in float32.
_MATRICES = ("gate_weight", "gate_down", "gate_up", "query_map", "output_map")


class Form(Settings):
    """How a layer computes linear attention; the defaults are for conversion while serving.

    Each state forgets at rates of its own: ``log g = max(logsigmoid(z) / temperature, floor)``.
    """

    name: ClassVar[str] = "dsla"
    role: ClassVar[str] = "the form of pass"

    gate: Literal["key", "lowrank", "full"] = "key"
    """What gates read: the head's unrotated key, so that cached keys can be folded into states; or
    the block's input, through a bottleneck, or by one matrix (as DSLA's authors)."""
    rank: int = Field(default=64, ge=1)
    """Width of the bottleneck of `lowrank` gates."""
    states: int = Field(default=2, ge=1)
    """States per head: 2 is DSLA, 1 gated linear attention."""
    temperature: float = Field(default=16.0, gt=0)
    """Divides the logarithm of the gates."""
    floor: float | None = Field(default=-1.0, lt=0)
    """Least logarithm of a gate; at -1 or above whole chunks of 64 tokens run at once."""
    rope: Literal["none", "keep"] = "none"
    """Whether queries and keys are rotated as the softmax layer rotates them."""
    write_scale: Literal["none", "sqrt"] = "sqrt"
    """Factor of what is written: `sqrt` keeps the variance of a state independent of its
    half-life."""
    out_norm: Literal["none", "rms"] = "rms"
    """Normalisation of each head's output, with a learned weight."""
    state_heads: Literal["kv", "query"] = "kv"
    """Whether states belong to key/value heads or to query heads."""
    adapt: Literal["none", "heads"] = "none"
    """Learned matrices per head on queries and outputs; keys and values stay the teacher's."""
    half_lives: tuple[Half, ...] | None = None
    """Shortest and longest initial half-life in tokens of each state; default: from 4 to 16384,
    split between the states, the longest first."""

    @property
    def ranges(self) -> tuple[Half, ...]:
        """Initial half-lives of each state.

        Raises:
            InputError: their number is not that of the states.
        """
        if self.half_lives is None:
            return _DUAL if self.states == 2 else _split(self.states)
        if len(self.half_lives) != self.states or any(
            not 0 < low <= high for low, high in self.half_lives
        ):
            raise InputError(
                f"key 'half_lives' of pass 'dsla' is {self.half_lives} for {self.states} states",
                "give one pair [shortest, longest] in tokens per state",
            )
        return self.half_lives

    def heads(self, site: Site) -> int:
        """Heads of a layer that have states of their own."""
        return site.kv_heads if self.state_heads == "kv" else site.query_heads

    def initial(self, site: Site, hidden: int, seed: int = 0) -> dict[str, Tensor]:
        """Parameters of one layer before training, all float32.

        Args:
            site: the layer.
            hidden: width of the model.
            seed: of the gates' small random weights.

        Returns:
            ``gate_bias`` [H, N, D], ``mixing_logits`` [N] and, as the form says, ``gate_weight``
            [H, D, N·D] (``key``) or [N·H·D, hidden] (``full``), ``gate_down`` [N·rank, hidden],
            ``gate_up`` [N, rank, H·D], ``norm_weight`` [Hq, Dv], ``query_map`` [Hq, D, D],
            ``output_map`` [Hq, Dv, Dv].
        """
        heads, states, width = self.heads(site), self.states, site.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "key": {"gate_weight": (heads, width, states * width)},
            "full": {"gate_weight": (states * heads * width, hidden)},
            "lowrank": {
                "gate_down": (states * self.rank, hidden),
                "gate_up": (states, self.rank, heads * width),
            },
        }[self.gate]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + site.layer)
        found = {
            name: torch.randn(shape, generator=generator) * _GATE_STD
            for name, shape in shapes.items()
        }
        found["gate_bias"] = self.initial_bias(width).expand(heads, states, width).clone()
        found["mixing_logits"] = torch.zeros(states)
        if self.out_norm == "rms":
            found["norm_weight"] = torch.ones(site.query_heads, site.value_dim)
        if self.adapt == "heads":
            found["query_map"] = torch.eye(width).repeat(site.query_heads, 1, 1)
            found["output_map"] = torch.eye(site.value_dim).repeat(site.query_heads, 1, 1)
        return found

    def initial_bias(self, width: int) -> Tensor:
        """Gate biases [N, D] whose half-lives are spaced evenly in their logarithm."""
        rows: list[Tensor] = []
        for low, high in self.ranges:
            logs = torch.linspace(math.log(low), math.log(high), width, dtype=torch.float64)
            rows.append(bias_of(logs.exp(), self.temperature))
        return torch.stack(rows).float()


def stored(parameters: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of the graph from trained parameters; differentiable.

    Args:
        parameters: as ``Form.initial`` gives them.
        dtype: of the model.
    """
    found = {
        name: value.to(dtype) if name in _MATRICES else value for name, value in parameters.items()
    }
    found["mixing"] = found.pop("mixing_logits").softmax(0)
    return found


def bias_of(half_life: Tensor, temperature: float) -> Tensor:
    """The gate logit that halves a state in so many tokens: logit(2^(-temperature / h))."""
    return -torch.log(torch.expm1(temperature * math.log(2) / half_life))


def half_life_of(log_decay: Tensor) -> Tensor:
    """Tokens in which a state is halved, from the logarithm of its decay per token."""
    return -math.log(2) / log_decay


def _split(states: int) -> tuple[Half, ...]:
    """Equal parts of the whole range on a logarithmic scale, the longest first."""
    step = (_LONGEST / _SHORTEST) ** (1 / states)
    return tuple(
        (_LONGEST / step ** (index + 1), _LONGEST / step**index) for index in range(states)
    )
