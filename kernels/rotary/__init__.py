"""Rotary position embedding of queries or keys."""

from fxgraft.kernels.rotary import op as op
