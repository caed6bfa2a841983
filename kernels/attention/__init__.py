"""Softmax attention: causal or full, grouped-query, window, chunk, soft cap, sinks, bias."""

from fxgraft.kernels.attention import op as op
