"""Tokens that a device was told to compute and that nobody has waited for yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fxgraft.generation.prompts import integers


@dataclass(frozen=True)
class UnreadTokens:
    """One launch's tokens on their way to the host.

    Attributes:
        host: int64 [B], valid once ``done`` has happened.
        done: recorded behind the copy; None on a CPU.
    """

    host: Tensor
    done: torch.cuda.Event | None

    @classmethod
    def of(cls, tokens: Tensor) -> Self:
        """Copy tokens int64 [B] without waiting; their tensor may be overwritten afterwards."""
        if tokens.device.type == "cpu":
            return cls(tokens.clone(), None)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return cls(host, done)

    def read(self) -> list[int]:
        """The tokens; waits for the device."""
        if self.done is not None:
            self.done.synchronize()
        return integers(self.host)
