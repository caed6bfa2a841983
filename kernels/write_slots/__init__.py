"""Fixed state of the requests in a batch, written to a pool of slots."""

from fxgraft.kernels.write_slots import op as op
