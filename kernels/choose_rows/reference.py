"""One of several values per row, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def choose_rows(choice: Tensor, options: Sequence[Tensor]) -> Tensor:
    """Choose; arguments and result are those of ``fxgraft.kernels.choose_rows.op``."""
    result = options[0].clone(memory_format=torch.contiguous_format)
    for number, option in enumerate(options[1:], start=1):
        chosen = (choice == number).view(-1, *[1] * (result.dim() - 1))
        result = torch.where(chosen, option, result)
    return result
