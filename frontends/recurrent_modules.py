"""Models of transformers that keep their recurrence in a method instead of a function.

For each such class, what to put in place of which method of which submodule so that tokens mix
inside ops that own their state only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Replacement:
    """A function in place of a method of one submodule.

    Attributes:
        owner: the submodule.
        name: the method.
        function: what stands in for it during capture.
        afterwards: what stands in for it from then on; the method itself if not given.
    """

    owner: nn.Module
    name: str
    function: Callable[..., Any]
    afterwards: Callable[..., Any] | None = None


def replacements(module: nn.Module) -> list[Replacement]:
    """What to replace in one submodule of a model while its recurrences emit ops."""
    for parent in type(module).__mro__:
        rule = _RULES.get(f"{parent.__module__}.{parent.__qualname__}")
        if rule is not None:
            return rule(module)
    return []


def _rwkv_model(model: Any) -> list[Replacement]:
    """Capture the weights as they are, and let the model change only copies of them later.

    On its first call in eval mode the model divides weights by powers of two, in place, and its
    hidden states to match, against overflow in float16. The captured graph shares the weights.
    """

    def rescale_copies() -> None:
        delattr(model, "_rescale_layers")  # this function itself, which hides the method
        for block in model.blocks:
            for linear in (block.attention.output, block.feed_forward.value):
                linear.weight = nn.Parameter(
                    linear.weight.detach().clone(), linear.weight.requires_grad
                )
        model._rescale_layers()

    return [Replacement(model, "_rescale_layers", lambda: None, afterwards=rescale_copies)]


def _rwkv_block(block: Any) -> list[Replacement]:
    return [Replacement(block.time_shift, "forward", _previous_token)]


def _previous_token(hidden: torch.Tensor) -> torch.Tensor:
    """Each token gets the hidden state [B, S, C] of the one before it."""
    return torch.ops.fxgraft.causal_pad(hidden, size=1, dim=1)[0][:, :-1]


def _recurrent_gemma(block: Any) -> list[Replacement]:
    convolution = block.conv_1d

    def convolve(x: torch.Tensor) -> torch.Tensor:
        weight = convolution.weight.squeeze(1)
        return torch.ops.fxgraft.causal_conv1d(x, weight, convolution.bias)[0]

    def scan(
        hidden_states: torch.Tensor,
        recurrent_gate: torch.Tensor,
        reset: torch.Tensor,
        recurrent_states: None,
    ) -> tuple[torch.Tensor, None]:
        decay = recurrent_gate * ~reset
        return torch.ops.fxgraft.linear_recurrence(hidden_states, decay)[0], None

    return [
        Replacement(convolution, "forward", convolve),
        Replacement(block.rg_lru, "_rnn_scan", scan),
    ]


def _xlstm(backend: Any) -> list[Replacement]:
    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        igate: torch.Tensor,
        fgate: torch.Tensor,
        c_initial: torch.Tensor | None = None,
        n_initial: torch.Tensor | None = None,
        m_initial: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        by_token = (x.transpose(1, 2) for x in (query, key, value, igate, fgate))
        stabilizer = None if m_initial is None else m_initial.squeeze(-1)
        output, memory, normalizer, stabilizer = torch.ops.fxgraft.mlstm(
            *by_token, c_initial, n_initial, stabilizer,
            scale=float(query.shape[-1]) ** -0.5, epsilon=backend.config.eps,
        )  # fmt: skip
        return output.transpose(1, 2), (memory, normalizer, stabilizer.unsqueeze(-1))

    return [Replacement(backend, "forward", forward)]


def _minimax(attention: Any) -> list[Replacement]:
    """Lightning attention (arXiv 2401.04658): ``ssd`` with constant time steps."""

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: object,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        projected = attention.act_fn(attention.qkv_proj(hidden_states))
        if attention_mask is not None:
            projected = (projected * attention_mask[:, :, None]).to(projected.dtype)
        heads = projected.unflatten(-1, (attention.num_attention_heads, 3 * attention.head_dim))
        query, key, value = heads.split(attention.head_dim, -1)
        steps = torch.ones_like(value[..., 0])
        rate = -attention.slope_rate.flatten()
        output = torch.ops.fxgraft.ssd(value, steps, rate, key, query)[0]
        output = attention.norm(output.flatten(2))
        output = torch.sigmoid(attention.output_gate(hidden_states)) * output
        return attention.out_proj(output), None

    return [Replacement(attention, "forward", forward)]


def _zaya(projection: Any) -> list[Replacement]:
    """Compressed convolutional attention (arXiv 2510.04476)."""

    def forward(
        hidden_states: torch.Tensor, past_key_values: None, conv_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if conv_mask is not None:
            hidden_states = hidden_states * conv_mask[:, :, None].to(hidden_states.dtype)
        query, key = projection.q_proj(hidden_states), projection.k_proj(hidden_states)
        mixed = _zaya_convolutions(projection, torch.cat([query, key], -1))
        groups, dim = projection.num_key_value_groups, projection.head_dim
        mean = (query.unflatten(-1, (-1, groups, dim)) + key.unflatten(-1, (-1, 1, dim))) / 2
        residual = torch.cat([mean.flatten(2), mean.mean(3).flatten(2)], -1)
        by_head = (*hidden_states.shape[:2], -1, dim)
        query_and_key = (mixed + residual).reshape(by_head)
        delayed = projection.v_proj_delayed(_previous_token(hidden_states))
        value = torch.cat([projection.v_proj_current(hidden_states), delayed], -1).view(by_head)
        heads = projection.num_attention_heads
        return query_and_key[:, :, :heads], query_and_key[:, :, heads:], value

    return [Replacement(projection, "forward", forward)]


def _zaya_convolutions(projection: Any, mixed: torch.Tensor) -> torch.Tensor:
    """A depthwise, then a grouped convolution over [B, S, C].

    The first one's bias is added after the padding of the second: transformers pads once before
    both, so the second one reads that bias, not zeros, in front of the first token.
    """
    first, second = projection.conv_qk_depthwise, projection.conv_qk_grouped
    mixed = torch.ops.fxgraft.causal_conv1d(mixed.transpose(1, 2), first.weight.squeeze(1))[0]
    past = second.kernel_size[0] - 1
    mixed = torch.ops.fxgraft.causal_pad(mixed, size=past, dim=2)[0] + first.bias[:, None]
    return F.conv1d(mixed, second.weight, second.bias, groups=second.groups).transpose(1, 2)


def _inkling2(convolution: Any) -> list[Replacement]:
    def forward(
        hidden_states: torch.Tensor,
        dynamic_input: torch.Tensor,
        past_key_values: None = None,
        conv_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        heads, width = convolution.num_heads, convolution.conv_kernel_size
        dynamic = convolution.weight_proj(dynamic_input).float().unflatten(-1, (heads, 1, width))
        static = convolution.static_weight.float().t().unflatten(0, (heads, -1))
        context = residual = hidden_states.float()
        if conv_mask is not None:
            context = context * conv_mask[:, :, None]
        context = torch.ops.fxgraft.causal_pad(context, size=width - 1, dim=1)[0]
        # the newest token comes first in the taps, last in the window
        windows = context.unfold(1, width, 1).flip(-1).unflatten(2, (heads, -1))
        output = (windows * (static + dynamic)).sum(-1).flatten(2)
        return ((output + residual) / math.sqrt(2 * width + 1)).to(hidden_states.dtype)

    return [Replacement(convolution, "forward", forward)]


_RULES: dict[str, Callable[[Any], list[Replacement]]] = {
    f"transformers.models.{name}": rule
    for name, rule in {
        "rwkv.modeling_rwkv.RwkvModel": _rwkv_model,
        "rwkv.modeling_rwkv.RwkvSelfAttention": _rwkv_block,
        "rwkv.modeling_rwkv.RwkvFeedForward": _rwkv_block,
        "recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRecurrentBlock": _recurrent_gemma,
        "xlstm.modeling_xlstm.xLSTMBackend": _xlstm,
        "minimax.modeling_minimax.MiniMaxLightningAttention": _minimax,
        "zaya.modeling_zaya.ZayaCCAProjection": _zaya,
        "inkling2.modeling_inkling2.Inkling2DynamicShortConvolution": _inkling2,
    }.items()
}
