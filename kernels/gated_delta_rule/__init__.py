"""``fxgraft::gated_delta_rule``: the recurrence of Gated DeltaNet and of Kimi delta attention.

A matrix state decays, then has its answer for the key replaced by the new value (arXiv 2412.06464;
with one decay per channel, arXiv 2510.26692).
"""

from fxgraft.kernels.gated_delta_rule.op import SPEC

__all__ = ["SPEC"]
