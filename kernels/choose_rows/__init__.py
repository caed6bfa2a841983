"""One of several values for each row of a batch."""

from fxgraft.kernels.choose_rows import op as op
