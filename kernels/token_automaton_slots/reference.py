"""The token automaton over slots, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fxgraft.kernels.token_automaton import reference as dense


def token_automaton_slots(
    input_ids: Tensor,
    next_state: Tensor,
    fire: Tensor,
    automaton_cache: Tensor,
    slots: Tensor,
    past: Tensor,
    classes: Tensor | None = None,
) -> Tensor:
    """Run and write; arguments and result are those of the op in ``op.py``."""
    rows = slots.clamp(min=0)
    found = automaton_cache.index_select(0, rows)
    started = (past > 0) & (slots >= 0)
    state = torch.where(started, found, 0)
    fired, last = dense.token_automaton(input_ids, next_state, fire, state, classes)
    # Rows without a request put back what lies in the slot that belongs to nobody.
    active = (past >= 0) & (slots >= 0)
    automaton_cache.index_copy_(0, rows, torch.where(active, last, found))
    return fired
