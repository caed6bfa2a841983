"""How far what two models give is apart, as losses that training can minimise."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of logits [B, S, V], mean over tokens."""
    logs = F.log_softmax(student.float(), -1).flatten(0, 1)
    return F.kl_div(logs, F.log_softmax(teacher.float(), -1).flatten(0, 1), log_target=True,
                    reduction="batchmean")  # fmt: skip
