"""Share of each query's attention, or sum of its logits, that falls on chosen keys."""

from fxgraft.kernels.attention_mass import op as op
