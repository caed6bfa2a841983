"""The keep-mask of attention as a tensor, for models that compute with the mask themselves."""

from fxgraft.kernels.causal_mask import op as op
