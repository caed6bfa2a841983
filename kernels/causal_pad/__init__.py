"""``fxgraft::causal_pad``: put a tensor's own recent past in front of it.

The one primitive behind token shifts and short convolutions that are not depthwise (RWKV's token
shift, ZAYA's grouped convolution, Inkling 2's dynamic one): they read the padded tensor with plain
PyTorch, and the op carries the entries that the next step needs.
"""

from fxgraft.kernels.causal_pad.op import SPEC

__all__ = ["SPEC"]
