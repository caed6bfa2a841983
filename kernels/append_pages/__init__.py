"""Growing state in blocks: write the new tokens, read the whole."""

from fxgraft.kernels.append_pages import op as op
