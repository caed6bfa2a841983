"""The pass ``spin``: which heads are scored, ranked and suppressed, where and when."""

from __future__ import annotations

import operator
from decimal import Decimal
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.errors import InputError
from fxgraft.images import find_merge
from fxgraft.kernels.spec import argument, dims
from fxgraft.passes.spin.decoder import Attention, find_attentions
from fxgraft.passes.spin.rows import RowBuilder, Rows
from fxgraft.program import Program
from fxgraft.transform import Effect, Pass

Score = Literal["logit_sum", "mass", "random", "uniform"]
_MASKS = ("key_mask", "bias", "sinks")
_RULES = ("scale", "is_causal", "window", "chunk", "softcap")


class Spin(Pass):
    """Suppress the heads that look least at the image (SPIN, arXiv 2505.16411).

    In each layer and for each gated row anew, heads are ranked by how much they attend to the
    image. The best ones stay; the outputs of the others are multiplied by a factor before the
    output projection. Keys, values and attention weights stay as they are.
    """

    effect: ClassVar[Effect] = Effect.BEHAVIOUR
    requires: ClassVar[frozenset[str]] = frozenset({"stateless", "causal_lm", "has_attention"})
    looks_for: ClassVar[str] = "attention of text behind an image"

    score: Score = "logit_sum"
    """Rank by the sum of the logits (the authors' code) or of the weights (the paper's words) over
    the image; `random` and `uniform` are controls: a fixed random order of each layer's heads, and
    all heads times the mean gate."""
    keep: float = Field(default=0.95, gt=0, le=1)
    """Share of the heads that stay, rounded down to whole heads."""
    heads: int | None = Field(default=None, ge=0)
    """Number of heads that stay, instead of a share."""
    factor: float = Field(default=0.0, ge=0)
    """What the outputs of the other heads are multiplied by; 0 removes them, 1 changes nothing."""
    amplify: bool = False
    """Allow a factor above 1."""
    layers: tuple[int, int] | None = None
    """First layer, and the one behind the last; default all layers of the language model."""
    rows: Literal["last", "all_text"] = "last"
    """Gate the last token of the prompt and every generated one (the authors' code), or every text
    token behind the image (the paper's words)."""
    image_tokens: tuple[int, ...] | None = None
    """Ids of the tokens that images are made of; default those that the model itself replaces."""
    span: tuple[int, int] | None = None
    """First position of the image, and the one behind its last, padding not counted: for models
    without image tokens."""
    seed: int = 0
    """Of the score `random`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("layers", "span"):
            given = getattr(self, name)
            if given is not None and not 0 <= given[0] <= given[1]:
                raise _wrong(name, f"is no range: {list(given)}", "give a start and a later end")
        if self.span is not None and self.span[0] == self.span[1]:
            raise _wrong("span", f"is empty: {list(self.span)}", "give a start and a later end")
        if self.factor > 1 and not self.amplify:
            raise _wrong("factor", f"is {self.factor:g}, over 1", "set 'amplify' to allow that")
        return self

    def neutral(self) -> Spin:
        """Multiply by 1."""
        return self.model_copy(update={"factor": 1.0})

    def precheck(self, program: Program) -> None:
        """Refuse layers, heads and images that the model does not have."""
        found = find_attentions(program)
        if self.layers is not None and self.layers[1] > len(found):
            raise InputError(
                f"pass 'spin': field 'layers' ends at {self.layers[1]}, the language model has "
                f"{len(found)} layers with attention",
                f"end at {len(found)} or before",
            )
        few = [one for one in found if self.heads is not None and one.heads < self.heads]
        if few:
            raise InputError(
                f"pass 'spin': field 'heads' keeps {self.heads} heads, layer {few[0].layer} has "
                f"{few[0].heads}",
                "keep fewer, or give a share in 'keep'",
            )
        self._check_images(program)

    def run(self, program: Program) -> list[str]:
        """Insert score and gate behind the attention of each chosen layer."""
        start, end = self.layers or (0, None)
        chosen = [one for one in find_attentions(program)[start:end] if self._suppressed(one)]
        if not chosen:
            return ["every head keeps its output"]
        rows = self._rows(program)
        fallbacks = [self._gate(program, one, rows) for one in chosen]
        graphs.finish(program.graph_module)
        return [_summary(chosen, self), *_fallback_lines(fallbacks)]

    def kept(self, heads: int) -> int:
        """How many of a layer's heads stay."""
        if self.heads is not None:
            return self.heads
        # 0.29 · 100 is 28.999... in binary.
        return int(Decimal(str(self.keep)) * heads)

    def _suppressed(self, one: Attention) -> bool:
        return self.factor != 1 and self.kept(one.heads) < one.heads

    def _check_images(self, program: Program) -> None:
        if self.span is not None:
            limit = program.origin.get("context_length")
            if isinstance(limit, int) and 0 < limit < self.span[1]:
                raise InputError(
                    f"pass 'spin': field 'span' ends at {self.span[1]}, outside the model's "
                    f"context of {limit} tokens",
                    "give positions of the prompt",
                )
            return
        tokens = self._tokens(program)
        size = self._vocabulary(program)
        if not tokens or not all(0 <= token < size for token in tokens):
            raise InputError(
                f"pass 'spin': field 'image_tokens' is {list(tokens)}, the model has the token "
                f"ids 0 to {size - 1}",
                "give the ids that stand for images in its prompts",
            )

    def _tokens(self, program: Program) -> tuple[int, ...]:
        if self.image_tokens is not None:
            return self.image_tokens
        merge = find_merge(program)
        if merge is None:
            raise InputError(
                "pass 'spin': the model writes no images over its tokens, so where they are is "
                "not known",
                "use a vision-language model, or set the field 'image_tokens' or 'span'",
            )
        return merge.tokens

    def _vocabulary(self, program: Program) -> int:
        high = program.input("input_ids").high
        return high or int(dims(program.output_nodes["logits"])[-1])  # pyright: ignore[reportArgumentType]

    def _rows(self, program: Program) -> Rows:
        builder = RowBuilder(program)
        if self.span is not None:
            return builder.of_span(self.span, self.rows)
        return builder.of_tokens(self._tokens(program), self._vocabulary(program), self.rows)

    def _gate(self, program: Program, one: Attention, rows: Rows) -> str | None:
        """Gate one layer; why the sum of keys could not be used, if it could not."""
        users = list(one.node.users)
        score, fallback = self._score(program, one, rows)
        keep, factor = self.kept(one.heads), self.factor
        if self.score == "uniform":
            keep, factor = 0, (keep + (one.heads - keep) * factor) / one.heads
        anchor = max(one.node, score)
        gated = graphs.insert(
            anchor,
            torch.ops.fxgraft.head_gate.default,
            (one.node, score, rows.gated),
            {"keep": keep, "factor": factor},
            after=True,
            name="gated",
        )
        for user in users:
            user.replace_input_with(one.node, gated)
        return fallback

    def _score(self, program: Program, one: Attention, rows: Rows) -> tuple[Node, str | None]:
        node = one.node
        if self.score in ("random", "uniform"):
            return self._constant_score(program, one), None
        query, key = argument(node, "query"), argument(node, "key")
        reason = one.why_not_linear
        if self.score == "logit_sum" and reason is None:
            args = (query, key, rows.image)
            scale = {"scale": argument(node, "scale")}
            both = graphs.insert(node, torch.ops.fxgraft.logit_sum.default, args, scale)
            return graphs.insert(node, operator.getitem, (both, 0), name="head_score"), None
        rules = {name: argument(node, name) for name in _RULES}
        normalize = self.score == "mass"
        mass = graphs.insert(
            node,
            torch.ops.fxgraft.attention_mass.default,
            (query, key, rows.image, *(argument(node, name) for name in _MASKS)),
            {**rules, "normalize": normalize},
            name="head_score",
        )
        return mass, None if normalize else f"layer {one.layer}: {reason}"

    def _constant_score(self, program: Program, one: Attention) -> Node:
        """[1, H, 1], one order for all rows."""
        generator = torch.Generator().manual_seed(self.seed + one.layer)
        order = torch.rand(one.heads, generator=generator).to(program.device)
        stored = program.add_weight(f"spin.order_{one.layer}", order[None, :, None])
        return graphs.insert_weight(program.graph_module, one.node, stored)


def _wrong(field: str, problem: str, remedy: str) -> InputError:
    return InputError(f"pass 'spin': field {field!r} {problem}", remedy)


def _summary(chosen: list[Attention], step: Spin) -> str:
    first, last = chosen[0], chosen[-1]
    return (
        f"{step.kept(first.heads)} of {first.heads} heads kept in layers {first.layer} to "
        f"{last.layer}, the others times {step.factor:g}, by {step.score}, rows {step.rows}"
    )


def _fallback_lines(reasons: list[str | None]) -> list[str]:
    found = [reason for reason in reasons if reason is not None]
    if not found:
        return []
    return [
        "the logits are summed one by one, not through a summed key, in "
        f"{len(found)} layers: {'; '.join(found)}"
    ]
