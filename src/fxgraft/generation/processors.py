"""From logits to the scores that are drawn from, with other options in each row.

The definitions and their order are transformers' (``generation/logits_process.py``). Rows whose
setting is neutral are left out of the work, so greedy rows never pay for sorting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxgraft.generation.options import SamplingOptions

_REMOVED = float("-inf")
# Sorting a whole vocabulary costs 7 ms per row on a CPU core, finding its largest 256 values
# 0.1 ms, and they nearly always hold the nucleus.
_NUCLEUS_GUESSES = (256, 4096)


@dataclass(frozen=True)
class History:
    """The tokens of one row so far.

    Attributes:
        tokens: int64 [L], the prompt without padding, then the generated tokens.
        prompt_length: how many of them are the prompt.
    """

    tokens: Tensor
    prompt_length: int

    @property
    def generated(self) -> int:
        """Number of generated tokens."""
        return len(self.tokens) - self.prompt_length


def process_logits(
    logits: Tensor, options: Sequence[SamplingOptions], histories: Sequence[History]
) -> Tensor:
    """Apply each row's options to its logits.

    Args:
        logits: floating point [B, V]; not changed.
        options: one per row; ``eos_token_id`` resolved.
        histories: one per row.

    Returns:
        Scores float32 [B, V]; tokens that cannot be chosen have -inf.
    """
    scores = logits.to(torch.float32, copy=True)
    for row, (option, history) in enumerate(zip(options, histories, strict=True)):
        if option.repetition_penalty != 1.0:
            _penalize(scores[row], history.tokens, option.repetition_penalty)
        if option.eos_token_id and history.generated < option.min_new_tokens:
            scores[row, [t for t in option.eos_token_id if t < scores.shape[-1]]] = _REMOVED
    for name, neutral, warp in _WARPS:
        settings = [getattr(o, name) if o.do_sample else neutral for o in options]
        scores = _on_rows(scores, settings, neutral, warp)
    return scores


def _penalize(scores: Tensor, tokens: Tensor, penalty: float) -> None:
    """Move seen tokens away from being chosen (arXiv 1909.05858, section 4.1), in place."""
    seen = tokens[tokens < len(scores)]
    old = scores[seen]
    scores[seen] = torch.where(old < 0, old * penalty, old / penalty)


def _on_rows(
    scores: Tensor,
    settings: Sequence[float],
    neutral: float,
    warp: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    rows = [row for row, setting in enumerate(settings) if setting != neutral]
    if not rows:
        return scores
    column = torch.tensor([settings[row] for row in rows], dtype=torch.float64)[:, None]
    column = column.to(scores.device)
    if len(rows) == len(settings):
        return warp(scores, column)
    index = torch.tensor(rows, device=scores.device)
    return scores.index_copy(0, index, warp(scores[index], column))


def _heat(scores: Tensor, temperature: Tensor) -> Tensor:
    return scores / temperature.float()


def _keep_top_k(scores: Tensor, top_k: Tensor) -> Tensor:
    """Keep the k largest scores of each row, and all that tie with the last of them."""
    wanted = top_k.long().clamp(max=scores.shape[-1])
    largest = scores.topk(int(wanted.max()), dim=-1).values
    return scores.masked_fill(scores < largest.gather(-1, wanted - 1), _REMOVED)


def _keep_nucleus(scores: Tensor, top_p: Tensor) -> Tensor:
    """Remove the least likely tokens as long as their mass is at most 1 - p (arXiv 1904.09751)."""
    # Rounded to float32 as in transformers, whose cut this must reproduce.
    removable = (1 - top_p).float().double()
    index, mass = _likeliest(scores.softmax(dim=-1), removable)
    remove = mass <= removable
    remove[:, 0] = False
    kept = scores.gather(-1, index).masked_fill(remove, _REMOVED)
    return torch.full_like(scores, _REMOVED).scatter(-1, index, kept)


def _likeliest(probabilities: Tensor, removable: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, at least all beyond ``removable``, in descending order.

    Returns:
        Their ids int64 [B, N], and for each the mass of itself and all less likely ones,
        float64 [B, N].
    """
    vocabulary = probabilities.shape[-1]
    for count in _NUCLEUS_GUESSES:
        if count < vocabulary:
            values, index = probabilities.topk(count, dim=-1)
            outside = (1 - values.sum(dim=-1, keepdim=True, dtype=torch.float64)).clamp(min=0)
            if bool((outside <= removable).all()):
                return index, outside + _mass_from_below(values)
    values, index = probabilities.sort(dim=-1, descending=True)
    return index, _mass_from_below(values)


def _mass_from_below(descending: Tensor) -> Tensor:
    return descending.flip(-1).cumsum(dim=-1, dtype=torch.float64).flip(-1)


def _keep_likely(scores: Tensor, min_p: Tensor) -> Tensor:
    """Remove tokens less likely than p times the likeliest (arXiv 2407.01082)."""
    probabilities = scores.softmax(dim=-1)
    least = min_p.float() * probabilities.amax(dim=-1, keepdim=True)
    return scores.masked_fill(probabilities < least, _REMOVED)


_WARPS: tuple[tuple[str, float, Callable[[Tensor, Tensor], Tensor]], ...] = (
    ("temperature", 1.0, _heat),
    ("top_k", 0, _keep_top_k),
    ("top_p", 1.0, _keep_nucleus),
    ("min_p", 0.0, _keep_likely),
)
