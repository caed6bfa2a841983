"""Attention of new tokens over keys and values that lie in blocks shared by all requests."""

from fxgraft.kernels.paged_attention import op as op
