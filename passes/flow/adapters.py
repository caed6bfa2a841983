"""Low-rank adapters on pruned layers, made by PEFT and trained behind the masks.

The weight that runs is mask · (W + s B A), with s = alpha / rank. PEFT makes, initialises and
names the adapters; its own forward pass, x Wᵀ + s x Aᵀ Bᵀ, would train what the mask then cuts
away, so weights are computed here and put in place of the model's. Folding is then exact, and a
group keeps its N places. LoRA: arXiv 2106.09685; masks in training: SPP, arXiv 2405.16057.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxgraft.errors import InputError
from fxgraft.kernels.nm_linear.packing import kept_mask
from fxgraft.passes.flow.patterns import Pattern
from fxgraft.passes.flow.settings import Recovery
from fxgraft.passes.flow.stream import Pruned, decode, encode
from fxgraft.passes.flow.units import Unit
from fxgraft.program import Program

_NAME = "default"


def require_peft() -> Any:
    """The package peft.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            "pass 'flow': 'recovery' needs the package peft, which is not installed",
            "install it with: pip install 'fxgraft[lora]', or leave 'recovery' out",
        )
    return importlib.import_module("peft")


@dataclass(frozen=True)
class AdaptedLayer:
    """One pruned layer and its adapters.

    Attributes:
        unit: the layer.
        pattern: its N:M.
        kept: the mask, bool [copies, O, K].
        adapted: PEFT's layer of each copy; its base is the pruned matrix, which stays.
    """

    unit: Unit
    pattern: Pattern
    kept: Tensor
    adapted: tuple[Any, ...]

    def matrices(self) -> Tensor:
        """mask · (W + s B A) [copies, O, K], in float32 for shorter types; differentiable."""
        sums = [one.base_layer.weight + one.get_delta_weight(_NAME) for one in self.adapted]
        return torch.where(self.kept, torch.stack(sums), 0)

    def weight(self, program: Program) -> Tensor:
        """The same as the model stores it, in the weight's dtype."""
        return self.unit.write(program.weight(self.unit.weight), self.matrices())

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """The layer with its adapters folded in, encoded; its mask is as before."""
        dtype = self.adapted[0].base_layer.weight.dtype
        return encode(self.unit, Pruned(self.matrices().to(dtype), self.kept, self.pattern))


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model.

    Attributes:
        layers: the pruned layers.
        parameters: of all adapters, float32, by PEFT's names.
    """

    layers: tuple[AdaptedLayer, ...]
    parameters: dict[str, nn.Parameter]


def make(
    units: Sequence[Unit], tensors: Mapping[str, Tensor], settings: Recovery, seed: int
) -> Adapters:
    """New adapters, which do not change the weights yet.

    Args:
        units: the prunable layers; those that were left dense get no adapters.
        tensors: the encoded layers.
        settings: rank and alpha.
        seed: of the first values.

    Raises:
        InputError: peft is not installed.
    """
    peft = require_peft()
    pruned = [
        (unit, matrices) for unit in units if (matrices := _pruned(unit, tensors)) is not None
    ]
    bases = [_base(matrix) for _, matrices in pruned for matrix in matrices]
    owner = nn.ModuleDict({str(index): base for index, base in enumerate(bases)})
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules="[0-9]+")
    with cast(Any, torch.random).fork_rng(devices=[]):
        cast(Any, torch.default_generator).manual_seed(seed)
        peft.inject_adapter_in_model(config, owner, adapter_name=_NAME)
    parameters = {name: value for name, value in owner.named_parameters() if value.requires_grad}
    for value in parameters.values():
        value.data = value.data.float()
    adapted = iter(owner.values())
    layers = [
        _layer(unit, tensors, tuple(next(adapted) for _ in matrices)) for unit, matrices in pruned
    ]
    return Adapters(tuple(layers), parameters)


def _pruned(unit: Unit, tensors: Mapping[str, Tensor]) -> Tensor | None:
    return decode(unit, tensors) if f"{unit.weight}.values" in tensors else None


def _base(matrix: Tensor) -> nn.Linear:
    base = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(matrix, requires_grad=False)
    return base


def _layer(unit: Unit, tensors: Mapping[str, Tensor], adapted: tuple[Any, ...]) -> AdaptedLayer:
    values, indices, pattern = (
        tensors[f"{unit.weight}.{part}"] for part in ("values", "indices", "pattern")
    )
    n, m = (int(size) for size in pattern)
    kept = kept_mask(values, indices, n, m)[:, : unit.product.reduction]
    shape = (unit.product.copies, unit.product.outputs, unit.product.reduction)
    return AdaptedLayer(unit, Pattern(n, m), kept.reshape(shape), adapted)
