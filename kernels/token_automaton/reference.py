"""The token automaton in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_DOUBLINGS = 20
"""Steps of the scan in an exported graph whose length is symbolic: 2**20 tokens in one call."""


def token_automaton(
    input_ids: Tensor,
    next_state: Tensor,
    fire: Tensor,
    state: Tensor | None = None,
    classes: Tensor | None = None,
    *,
    initial: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run; arguments and results are those of ``fxgraft.kernels.token_automaton.op``.

    A token is a function from state to state. Their running compositions come from a parallel
    scan (Hillis and Steele, 1986, "Data parallel algorithms"), so there is no loop over tokens.
    """
    batch, length = input_ids.shape
    num_states = next_state.shape[0]
    columns = input_ids.reshape(-1)
    if classes is not None:
        columns = classes.index_select(0, columns).to(torch.int64)
    steps = next_state.index_select(1, columns).to(torch.int64)
    runs = _running_compositions(steps.reshape(num_states, batch, length))
    if state is None:
        state = input_ids.new_full((batch,), initial, dtype=torch.int64)
    start = state[None, :, None]
    after = runs.gather(0, start.expand(1, batch, length))
    states = torch.cat((start, after), 2)
    fires = fire.index_select(1, columns).reshape(num_states, batch, length)
    fired = fires.gather(0, states[:, :, :-1])[0]
    return fired, states[0, :, -1].clone(memory_format=torch.contiguous_format)


def _running_compositions(steps: Tensor) -> Tensor:
    """For int64 functions ``steps[:, b, t]`` [K, B, S], compose each with all before it."""
    num_states, _, length = steps.shape
    identity = torch.arange(num_states, device=steps.device)[:, None, None]
    position = torch.arange(length, device=steps.device)
    runs = steps
    for doubling in range(_doublings(length)):
        source = position - 2**doubling
        earlier = runs.index_select(2, source.clamp(min=0))
        runs = runs.gather(0, torch.where(source >= 0, earlier, identity))
    return runs


def _doublings(length: int | torch.SymInt) -> int:
    return MAX_DOUBLINGS if isinstance(length, torch.SymInt) else max(length - 1, 0).bit_length()
