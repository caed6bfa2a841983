"""What distillation minimises (arXiv 2506.09316, section 3.2, and alternatives to its terms)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fxgraft.kernels.linear_attention.arguments import log_decay

Match = Literal["mse", "kl"]
Separation = Literal["centred", "raw", "hinge"]
_MARGIN = math.log(16)


def match(student: Tensor, teacher: Tensor, kind: Match) -> Tensor:
    """How far the student's attention output is from the teacher's, both [B, S, hidden].

    ``mse`` is relative to the teacher's energy; ``kl`` is the divergence of softmaxed features.
    """
    student, teacher = student.float(), teacher.float()
    if kind == "mse":
        return (student - teacher).square().sum() / teacher.square().sum().clamp(min=1e-12)
    logs = F.log_softmax(student, -1)
    return (
        F.kl_div(logs, F.log_softmax(teacher, -1), log_target=True, reduction="none").sum(-1).mean()
    )


def separation(gate: Tensor, temperature: float, floor: float | None, kind: Separation) -> Tensor:
    """How alike neighbouring states forget, averaged over tokens, heads and pairs of states.

    Args:
        gate: logits [B, S, H, N, D].
        temperature, floor: of the form.
        kind: ``centred``: cosine of log decays less their mean over channels; ``raw``: cosine of
            the gates, near 1 whatever they do (the paper's); ``hinge``: how much less than a
            factor of 16 the mean half-lives differ.
    """
    if gate.shape[3] == 1:
        return gate.new_zeros(())
    logs = log_decay(gate.float(), temperature, floor)
    first, second = logs[..., :-1, :], logs[..., 1:, :]
    if kind == "raw":
        return F.cosine_similarity(first.exp(), second.exp(), dim=-1).mean()
    if kind == "hinge":
        distance = (-second).log().mean(-1) - (-first).log().mean(-1)
        return (_MARGIN - distance).clamp(min=0).mean()
    first, second = (x - x.mean(-1, keepdim=True) for x in (first, second))
    return F.cosine_similarity(first, second, dim=-1).mean()


def mean(values: Sequence[Tensor]) -> Tensor:
    """The mean of scalars."""
    return torch.stack(list(values)).mean()
