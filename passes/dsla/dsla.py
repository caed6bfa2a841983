"""The pass ``dsla``: which layers it converts, and with which parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.offline import OfflineStage
from fxgraft.passes.dsla.distil import DslaDistillation
from fxgraft.passes.dsla.form import Form
from fxgraft.passes.dsla.rewrite import add_branch, offer_choice, replace_attention
from fxgraft.passes.dsla.sites import Site, find_sites, size
from fxgraft.passes.dsla.stages import Stages
from fxgraft.program import Program
from fxgraft.transform import Effect, Pass


class Dsla(Pass):
    """Softmax attention becomes linear attention with two states per head (arXiv 2506.09316).

    Queries, keys, values and the output projection are the model's own. What a converted layer
    adds (gates, and what the form says) comes from an artifact of ``fxgraft calibrate dsla``, or
    is new: then the model runs, and its answers mean nothing.

    1. An attention with a window, chunks, a soft cap, sinks, a bias or a mask with a row per query
       is refused, and so is one that is not causal.
    2. With ``live``, each row of a batch chooses by an input ``dsla_layer_<index>``; 0, the
       default, is the model as it was, bit for bit.
    """

    effect: ClassVar[Effect] = Effect.BEHAVIOUR
    requires: ClassVar[frozenset[str]] = frozenset({"stateless", "causal_lm"})
    excludes: ClassVar[frozenset[str]] = frozenset({"spin"})
    removes: ClassVar[frozenset[str]] = frozenset({"has_attention"})
    looks_for: ClassVar[str] = "causal softmax attention"
    offline: ClassVar[type[OfflineStage] | None] = DslaDistillation

    artifact: Path | None = None
    """Folder that `fxgraft calibrate dsla` wrote."""
    layers: tuple[int, ...] | None = None
    """Indices of the layers to convert."""
    count: int | None = Field(default=None, ge=0)
    """How many layers to convert, from the front of the order."""
    fraction: float | None = Field(default=None, ge=0, le=1)
    """Share of the layers to convert, rounded down, from the front of the order."""
    order: tuple[int, ...] | None = None
    """Layer indices, least sensitive first; default the artifact's, else the last layer first."""
    form: Form | None = None
    """The form of converted layers without an artifact, which has a form of its own."""
    live: bool = False
    """Keep the softmax layers beside the linear ones, so that requests change while they run."""
    seed: int = 0
    """Of the gates' initial weights, without an artifact."""

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Dsla:
        given = [n for n in ("layers", "count", "fraction") if getattr(self, n) is not None]
        if len(given) > 1 or not (given or self.artifact):
            found = " and ".join(given) or "none of layers, count, fraction and artifact"
            raise InputError(
                f"pass 'dsla' has {found}", "give one of layers, count, fraction, or an artifact"
            )
        if self.artifact is not None and self.form is not None:
            raise InputError(
                "pass 'dsla' has a form, and an artifact that has one of its own",
                "leave the form out",
            )
        return self

    def neutral(self) -> Dsla:
        """Convert no layer."""
        none = {"artifact": None, "layers": (), "count": None, "fraction": None, "order": None}
        return self.model_copy(update=none)

    def precheck(self, program: Program) -> None:
        """Refuse layers that cannot be converted, and an artifact of another model."""
        self._chosen(program)

    def run(self, program: Program) -> list[str]:
        """Insert the branches, and let readers of the attention read them or choose."""
        form, chosen = self._chosen(program)
        for site, parameters in chosen:
            branch = add_branch(program, site, form, parameters)
            if self.live:
                offer_choice(program, branch)
            else:
                replace_attention(branch)
        return _summary([site for site, _ in chosen], form, live=self.live)

    def _chosen(self, program: Program) -> tuple[Form, list[tuple[Site, dict[str, Tensor]]]]:
        """The form, and each layer to convert with its parameters."""
        if self.layers == ():
            return self.form or Form(), []
        sites, reasons = find_sites(program)
        by_layer = {site.layer: site for site in sites}
        if not sites:
            raise InputError(
                f"pass 'dsla': no layer can be converted; {_first(reasons)}",
                "use a model with causal softmax attention without windows",
            )
        stages = None if self.artifact is None else Stages.read(self.artifact, program)
        form = stages.form if stages is not None else self.form or Form()
        layers = self._layers(list(by_layer), reasons, stages)
        if stages is not None:
            return form, [(by_layer[layer], stages.parameters(layer)) for layer in layers]
        made = [by_layer[layer] for layer in layers]
        return form, [(s, form.initial(s, size(s.hidden, 2), self.seed)) for s in made]

    def _layers(self, able: list[int], reasons: dict[int, str], stages: Stages | None) -> list[int]:
        """Indices of the layers to convert."""
        trained = None if stages is None else stages.layers
        order = self.order or trained or able[::-1]
        if self.layers is not None:
            chosen = list(self.layers)
        elif self.fraction is not None:
            chosen = _first_of(order, math.floor(self.fraction * len(able)), "fraction")
        elif self.count is not None:
            chosen = _first_of(order, self.count, "count")
        else:
            chosen = list(order)
        for layer in chosen:
            _check(layer, able if trained is None else trained, reasons, trained is not None)
        if len(set(chosen)) < len(chosen):
            raise InputError(f"pass 'dsla': {chosen} names a layer twice", "name each layer once")
        return chosen


def _first_of(order: tuple[int, ...] | list[int], count: int, key: str) -> list[int]:
    if count > len(order):
        raise InputError(
            f"key {key!r} of pass 'dsla' asks for {count} layers, but the order has {len(order)}",
            "ask for fewer, or distil more stages",
        )
    return list(order[:count])


def _check(layer: int, able: list[int], reasons: dict[int, str], trained: bool) -> None:
    if layer in able:
        return
    reason = reasons.get(layer)
    if reason is None:
        why = "the artifact has no stage for it" if trained else "there is no such layer"
    else:
        why = reason
    known = ", ".join(str(index) for index in sorted(able))
    raise InputError(
        f"pass 'dsla': layer {layer} cannot be converted: {why}", f"the layers are: {known}"
    )


def _first(reasons: dict[int, str]) -> str:
    if not reasons:
        return "no block was found in it"
    layer = min(reasons)
    return f"layer {layer}: {reasons[layer]}"


def _summary(sites: list[Site], form: Form, *, live: bool) -> list[str]:
    what = "can be chosen to be linear" if live else "are linear"
    layers = ", ".join(str(site.layer) for site in sites)
    cells = sum(form.states * form.heads(s) * s.head_dim * s.value_dim for s in sites)
    lines = [f"layers {layers} {what}: {form.states} states per head, {form.gate} gates"]
    lines.append(f"{4 * cells / 2**20:.3g} MiB of states per sequence, whatever its length")
    return lines if sites else []
