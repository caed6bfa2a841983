"""The end of a greedy decode step: the likeliest token, and the inputs of the next step."""

from fxgraft.kernels.greedy_step import op as op
