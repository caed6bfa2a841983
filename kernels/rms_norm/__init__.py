"""Root-mean-square normalisation over the last dimension."""

from fxgraft.kernels.rms_norm import op as op
