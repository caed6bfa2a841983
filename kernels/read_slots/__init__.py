"""Fixed state of the requests in a batch, read from a pool of slots."""

from fxgraft.kernels.read_slots import op as op
