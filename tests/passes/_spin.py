"""SPIN written out on an original model: every logit, every weight, heads sorted."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

_NAME = "spin_reference"


@dataclass
class Reference:
    """What the attention of the original model does while it is active.

    Attributes:
        keep: number of heads that stay.
        factor: of the others.
        image: bool [B, T], keys that are image tokens.
        gated: bool [B, S], rows to gate.
        score: ``"logit_sum"`` or ``"mass"``.
        layers: layers to gate.
        gaps: smallest distance of the scores around the cut, over gated rows, as a share of their
            spread; one per layer.
    """

    keep: int
    factor: float
    image: Tensor
    gated: Tensor
    score: str = "logit_sum"
    layers: range = range(99)
    gaps: list[float] = field(default_factory=list[float])

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None,
        scale: float,
        layer: int,
    ) -> Tensor:
        """Attention output [B, S, H, D], gated."""
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        logits = query @ key.mT * scale
        if visible is None:
            visible = torch.ones_like(logits, dtype=torch.bool)
        weights = torch.softmax(logits.masked_fill(~visible, -torch.inf), -1).nan_to_num()
        output = weights @ value
        if layer in self.layers:
            of_image = self.image[:, None, None] & visible
            looked = logits if self.score == "logit_sum" else weights
            output = self.gate(output, torch.where(of_image, looked, 0).sum(-1))
        return output.transpose(1, 2).contiguous()

    def gate(self, output: Tensor, score: Tensor) -> Tensor:
        """Scale all but the first ``keep`` heads of a stable sort."""
        ranked = score.sort(dim=1, descending=True, stable=True)
        self._note_gap(ranked.values)
        rank = ranked.indices.argsort(1)
        gate = torch.where((rank < self.keep) | ~self.gated[:, None], 1.0, self.factor)
        return output * gate[..., None]

    def _note_gap(self, values: Tensor) -> None:
        if not 0 < self.keep < values.shape[1] or not bool(self.gated.any()):
            return
        spread = (values[:, 0] - values[:, -1]).clamp(min=1e-12)
        gap = (values[:, self.keep - 1] - values[:, self.keep]) / spread
        self.gaps.append(float(gap[self.gated].min()))


@contextlib.contextmanager
def active(model: nn.Module, reference: Reference) -> Generator[None]:
    """The model's language model attends as the reference does; its images as ever."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        scaling: float, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        layer = int(module.layer_idx)
        return reference.attend(query, key, value, mask, scaling, layer), None

    def masks(**options: Any) -> Tensor | None:
        options["allow_is_causal_skip"] = options["allow_is_bidirectional_skip"] = False
        return cast(Any, sdpa_mask)(**options)

    cast(Any, AttentionInterface).register(_NAME, attention)
    cast(Any, AttentionMaskInterface).register(_NAME, masks)
    text = cast(Any, model).config.get_text_config()
    before = text._attn_implementation_internal
    text._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        text._attn_implementation_internal = before


def text_behind_images(
    input_ids: Tensor, attention_mask: Tensor, token: int
) -> tuple[Tensor, Tensor]:
    """Image keys, and text rows with an image before them; both bool [B, S]."""
    real = attention_mask.bool()
    image = (input_ids == token) & real
    return image, (image.cumsum(1) > 0) & ~image & real
