"""Add a steering vector to chosen positions of the residual stream."""

from fxgraft.kernels.steer import op as op
