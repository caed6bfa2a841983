"""Attention of new tokens to chosen ones, over keys that lie in blocks shared by all requests."""

from fxgraft.kernels.paged_attention_mass import op as op
