"""``fxgraft::wkv``: the recurrence of RWKV-4 (arXiv 2305.13048).

A weighted mean of past values per channel, with weights from keys that fade with time.
"""

from fxgraft.kernels.wkv.op import SPEC

__all__ = ["SPEC"]
