"""``fxgraft::selective_scan``: the recurrence of Mamba-1 (arXiv 2312.00752).

Each channel has a state of N numbers that decays at a rate chosen by the input.
"""

from fxgraft.kernels.selective_scan.op import SPEC

__all__ = ["SPEC"]
