"""A linear layer whose weight keeps N of every M inputs of a row, stored packed."""

from fxgraft.kernels.nm_linear import op as op
