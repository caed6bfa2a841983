"""Tokens that were launched on the device and not read yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fxgraft.generation.processors import History
from fxgraft.generation.sampling import sample
from fxgraft.generation.unread import UnreadTokens
from fxgraft.kernels.greedy_step.reference import likeliest
from fxgraft.runtime.engine.batch import Batch
from fxgraft.runtime.engine.request import Request


@dataclass(frozen=True)
class Pending:
    """One launch.

    Attributes:
        requests: whose tokens they are.
        device_tokens: int64 [n] on the device.
        unread: the same on their way to the host.
    """

    requests: Sequence[Request]
    device_tokens: Tensor
    unread: UnreadTokens

    @classmethod
    def of_step(cls, requests: Sequence[Request], tokens: Tensor) -> Self:
        """Tokens of a step; copied at once, since the next step overwrites them."""
        return cls(requests, tokens, UnreadTokens.of(tokens))

    @classmethod
    def of_prefill(cls, request: Request, logits: Tensor) -> Self:
        """The token behind a prompt, from logits [1, V]."""
        tokens = choose(logits, likeliest(logits), [request])
        return cls.of_step([request], tokens)

    def read(self) -> list[int]:
        """The tokens; waits for the device."""
        return self.unread.read()


def override_sampled(batch: Batch, logits: Tensor) -> None:
    """Replace the likeliest token in rows whose options say otherwise."""
    rows = [r for r, request in enumerate(batch.requests) if not request.sampling.is_plain_greedy]
    if not rows:
        return
    index = torch.tensor(rows, device=logits.device)
    requests = [batch.requests[row] for row in rows]
    tokens = choose(logits[index], batch.chosen[index], requests)
    batch.chosen[index] = tokens
    batch.tokens[index] = tokens.clamp(min=0)


def choose(logits: Tensor, likely: Tensor, requests: Sequence[Request]) -> Tensor:
    """Tokens int64 [n] by each request's options; -1 where logits are not finite.

    Args:
        logits: [n, V].
        likely: the likeliest tokens, -1 where logits are not finite.
        requests: one per row.
    """
    options = [request.sampling for request in requests]
    if all(option.is_plain_greedy for option in options):
        return likely
    safe = torch.where((likely < 0)[:, None], 0, logits)
    histories = [_history(request) for request in requests]
    tokens = sample(safe, options, histories, [request.generator for request in requests])
    return torch.where(likely < 0, -1, tokens)


def _history(request: Request) -> History:
    known = torch.tensor(request.known)
    missing = request.launched - len(request.tokens)
    # Of tokens that were not read yet only the number matters here.
    tokens = torch.cat([known, known.new_full((max(missing, 0),), request.prompt[-1])])
    return History(tokens, len(request.prompt))
