"""``fxgraft::ssd``: the recurrence of Mamba-2, state-space duality (arXiv 2405.21060).

Each head has one matrix state with one decay per token. Linear attention with a fixed decay per
head (lightning attention, retention) is the special case of constant time steps.
"""

from fxgraft.kernels.ssd.op import SPEC

__all__ = ["SPEC"]
