"""Decode with the attention matrix written out, and heads suppressed as the authors' code does it.

Own words for their operations: logits of all keys, their sum over the image, divided by the
standard deviation over the heads, a softmax over the heads, the best ones; the other heads' outputs
times a factor. The cache is static, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from _spin_runs import Shape
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Suppression:
    """What is done to the heads.

    Attributes:
        keep: heads that stay; 0 leaves all as they are.
        factor: of the others.
    """

    keep: int = 0
    factor: float = 1.0


@dataclass
class EagerStep:
    """One token of each of ``batch`` requests with ``context`` tokens before it.

    Attributes:
        model: transformers' Llama; its weights are used.
        shape: of the model.
        batch, context: see above.
        suppression: of its heads.
        caches: keys and values [B, H, context + 1, D] of each layer; random if not given.
    """

    model: Any
    shape: Shape
    batch: int
    context: int
    suppression: Suppression
    caches: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = self.shape
        self.head_dim = shape.width // shape.heads
        sizes = (self.batch, shape.heads, self.context + 1, self.head_dim)
        options: Any = {"device": shape.device, "dtype": shape.dtype}
        if not self.caches:
            self.caches = [
                (torch.randn(sizes, **options), torch.randn(sizes, **options))
                for _ in range(shape.layers)
            ]
        self.ids = torch.full((self.batch, 1), 5, device=shape.device)
        self.position = torch.full((self.batch, 1), self.context, device=shape.device)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Logits [B, V]."""
        inner = self.model.model
        x = inner.embed_tokens(self.ids)
        cos, sin = inner.rotary_emb(x, self.position)
        for layer, caches in zip(inner.layers, self.caches, strict=True):
            x = x + self._attention(layer.self_attn, layer.input_layernorm(x), caches, cos, sin)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(inner.norm(x))[:, -1]

    def _attention(
        self, layer: Any, x: Tensor, caches: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor
    ) -> Tensor:
        batch = x.shape[0]
        project = (layer.q_proj, layer.k_proj, layer.v_proj)
        query, key, value = (
            one(x).view(batch, 1, -1, self.head_dim).transpose(1, 2) for one in project
        )
        query, key = (_turned(one, cos, sin) for one in (query, key))
        keys, values = caches
        keys[:, :, self.context :], values[:, :, self.context :] = key, value
        logits = query @ keys.mT * self.head_dim**-0.5
        weights = torch.softmax(logits, -1, dtype=torch.float32).to(x.dtype)
        output = weights @ values
        if self.suppression.keep:
            output = output * self._gate(logits)
        return layer.o_proj(output.transpose(1, 2).reshape(batch, 1, -1))

    def _gate(self, logits: Tensor) -> Tensor:
        """Factors [B, H, 1, 1]."""
        start, end = self.shape.span
        score = logits[:, :, -1, start:end].sum(-1)
        score = functional.softmax(score / score.std(1, keepdim=True), 1)
        best = score.topk(self.suppression.keep, 1).indices
        gate = torch.full_like(score, self.suppression.factor).scatter(1, best, 1.0)
        return gate[:, :, None, None]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def captured(step: Callable[[], Tensor], device: str) -> Callable[[], object]:
    """The step in a CUDA graph; on a CPU itself."""
    if device != "cuda":
        return step
    from fxgraft.backends.triton.cuda_graphs import GraphCapture

    return GraphCapture()(step)
