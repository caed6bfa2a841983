"""``fxgraft::linear_attention``: gated linear attention with one or more states per head.

With one state it is gated linear attention (arXiv 2312.06635), with two states that forget at
different rates dual-state linear attention (DSLA, arXiv 2506.09316).
"""

from fxgraft.kernels.linear_attention.op import SPEC

__all__ = ["SPEC"]
