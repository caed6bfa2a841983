"""Keep the heads of the highest scores, row by row, and scale the others."""

from fxgraft.kernels.head_gate import op as op
