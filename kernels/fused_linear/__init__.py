"""A linear layer with what stands around it: norm before, gate and residual after."""

from fxgraft.kernels.fused_linear import op as op
