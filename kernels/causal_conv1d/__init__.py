"""``fxgraft::causal_conv1d``: short depthwise convolution over time.

The convolution of Mamba, gated DeltaNet and LFM blocks. Its state is the last W - 1 inputs.
"""

from fxgraft.kernels.causal_conv1d.op import SPEC

__all__ = ["SPEC"]
