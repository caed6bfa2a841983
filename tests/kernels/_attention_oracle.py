"""Attention by loops over single numbers, and the argument combinations to try it on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.kernels._helpers import randn


@dataclass(frozen=True)
class Case:
    """Arguments of one call; tensors are float64."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    scale: float = 0.5
    is_causal: bool = True
    window: int | None = None
    chunk: int | None = None
    softcap: float = 0.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.query, self.key, self.value, self.key_mask, self.bias, self.sinks)

    @property
    def options(self) -> dict[str, Any]:
        names = ("scale", "is_causal", "window", "chunk", "softcap")
        return {name: getattr(self, name) for name in names}

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """Move the tensors, and cast the floating ones."""

        def move(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            return x.to(device, dtype if x.is_floating_point() else x.dtype)

        names = ("query", "key", "value", "key_mask", "bias", "sinks")
        return replace(self, **{n: move(x) for n, x in zip(names, self.tensors, strict=True)})


def make_case(
    batch: int = 2,
    kv_heads: int = 2,
    groups: int = 2,
    queries: int = 5,
    total: int = 5,
    head_dim: int = 4,
    value_dim: int = 4,
    **options: Any,
) -> Case:
    """A case with random query, key and value."""
    return Case(
        randn(batch, kv_heads * groups, queries, head_dim, seed=1),
        randn(batch, kv_heads, total, head_dim, seed=2),
        randn(batch, kv_heads, total, value_dim, seed=3),
        **options,
    )


def sees(case: Case, b: int, i: int, j: int) -> bool:
    """Whether query i of row b sees key j, by is_causal, window, chunk and key_mask."""
    total = case.key.shape[2]
    index = i + total - case.query.shape[2]
    mask = [True] * total if case.key_mask is None else [bool(x) for x in case.key_mask[b]]
    padding = mask.index(True) if True in mask else total
    visible = mask[j]
    if case.is_causal:
        visible = visible and j <= index
    if case.window is not None:
        visible = visible and j > index - case.window
    if case.chunk is not None:
        same_chunk = (index - padding) // case.chunk == (j - padding) // case.chunk
        visible = visible and same_chunk
    return visible


def attend(case: Case) -> Tensor:
    """The output [B, Hq, S, Dv] in float64."""
    batch, heads, queries, _ = case.query.shape
    _, kv_heads, total, value_dim = case.value.shape
    output = torch.zeros(batch, heads, queries, value_dim, dtype=torch.float64)
    bias = None if case.bias is None else case.bias.expand(batch, heads, queries, total)
    for b in range(batch):
        for h in range(heads):
            kv_head = h // (heads // kv_heads)
            for i in range(queries):
                logits: dict[int, float] = {}
                for j in range(total):
                    score = case.scale * float(case.query[b, h, i] @ case.key[b, kv_head, j])
                    if case.softcap:
                        score = case.softcap * math.tanh(score / case.softcap)
                    added = 0.0 if bias is None else bias[b, h, i, j].item()
                    if isinstance(added, bool):
                        added = 0.0 if added else -math.inf
                    if sees(case, b, i, j) and added != -math.inf:
                        logits[j] = score + added
                sink = 0.0 if case.sinks is None else math.exp(float(case.sinks[h]))
                denominator = sink + sum(math.exp(logit) for logit in logits.values())
                for j, logit in logits.items():
                    weight = math.exp(logit) / denominator
                    output[b, h, i] += weight * case.value[b, kv_head, j]
    return output


def padding(*rows: str) -> Tensor:
    """A key mask from rows like ``"..xx"``, with a dot for padding."""
    return torch.tensor([[character != "." for character in row] for row in rows])


def hiding_bias(*shape: int) -> Tensor:
    """A bias of which about a third of the entries is -inf."""
    bias = randn(*shape, seed=5)
    return bias.masked_fill(bias < -0.4, -math.inf)


FAST: dict[str, Case] = {
    "causal": make_case(),
    "full": make_case(is_causal=False),
    "cross": make_case(is_causal=False, queries=7, total=3),
    "one_head": make_case(kv_heads=1, groups=1, batch=1),
    "no_groups": make_case(kv_heads=3, groups=1),
    "past": make_case(queries=3, total=8),
    "decode": make_case(queries=1, total=8, groups=3),
    "first_token": make_case(queries=1, total=1),
    "value_dim": make_case(value_dim=3, queries=2),
    "window": make_case(window=2, total=7),
    "window_decode": make_case(window=3, queries=1, total=7),
    "wide_window": make_case(window=5),
    "chunk": make_case(chunk=2, queries=4, total=7),
    "wide_chunk": make_case(chunk=7),
    "full_chunk": make_case(chunk=3, is_causal=False),
    "padding": make_case(key_mask=padding("..xxx", "xxxxx")),
    "no_padding": make_case(key_mask=padding("xxxxx", "xxxxx")),
    "right_padding": make_case(key_mask=padding("xxx..", "xxxxx"), is_causal=False),
    "all_padding": make_case(key_mask=padding(".....", "..xxx")),
    "padding_decode": make_case(key_mask=padding("....x", "....."), queries=1),
    "padding_chunk": make_case(key_mask=padding("..xxxxx", "xxxxxxx"), chunk=3, queries=6, total=7),
    "padding_full_chunk": make_case(key_mask=padding("..xxx", "xxxxx"), chunk=5, is_causal=False),
    "padding_window": make_case(key_mask=padding("..x.xxx", "xxxxx.."), window=2, total=7),
    "bias": make_case(bias=randn(2, 4, 5, 5)),
    "bias_heads": make_case(bias=randn(1, 4, 1, 8), queries=3, total=8, is_causal=False),
    "bias_decode": make_case(bias=hiding_bias(2, 4, 1, 8), queries=1, total=8),
    "bias_one_row": make_case(bias=randn(1, 1, 5, 5), key_mask=padding("..xxx", "xxxxx")),
    "bias_hides": make_case(bias=hiding_bias(1, 4, 5, 5), window=3),
    "keep": make_case(bias=randn(2, 1, 5, 5) > 0, is_causal=False),
    "keep_heads": make_case(bias=randn(2, 4, 1, 8) > 0, queries=1, total=8),
    "keep_causal": make_case(bias=randn(1, 4, 5, 5) > 0, key_mask=padding("..xxx", "xxxxx")),
    "keep_nothing": make_case(bias=torch.zeros(1, 1, 1, 5, dtype=torch.bool), is_causal=False),
}
"""Cases that the library's fused attention can express."""

SLOW: dict[str, Case] = {
    "softcap": make_case(softcap=0.7),
    "softcap_bias": make_case(softcap=0.7, bias=hiding_bias(2, 4, 5, 5)),
    "sinks": make_case(sinks=randn(4)),
    "sinks_window": make_case(sinks=randn(4), window=2, queries=3, total=8),
    "sinks_padding": make_case(sinks=randn(4), key_mask=padding("..xxx", ".....")),
    "sinks_full": make_case(sinks=randn(4), is_causal=False),
    "everything": make_case(
        key_mask=padding("..xxxxx", "xxxxxxx"),
        bias=hiding_bias(2, 4, 6, 7),
        sinks=randn(4),
        softcap=1.5,
        window=4,
        chunk=3,
        queries=6,
        total=7,
    ),
}
"""Cases that only the reference computes."""

CASES = FAST | SLOW
