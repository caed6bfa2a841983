"""The product of a gated feed-forward layer: activation(gate) · up."""

from fxgraft.kernels.gated_activation import op as op
