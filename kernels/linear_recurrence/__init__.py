"""``fxgraft::linear_recurrence``: ``h[t] = decay[t] h[t-1] + x[t]`` per channel.

The recurrence inside the RG-LRU of Griffin and RecurrentGemma (arXiv 2402.19427), whose gates and
normalisation are ordinary graph nodes around it.
"""

from fxgraft.kernels.linear_recurrence.op import SPEC

__all__ = ["SPEC"]
