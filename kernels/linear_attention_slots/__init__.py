"""``fxgraft::linear_attention`` whose states lie in a pool of slots, which it updates in place."""

from fxgraft.kernels.linear_attention_slots import op as op
