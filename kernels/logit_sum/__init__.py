"""Sum of the attention logits of each query over chosen keys, without the logits."""

from fxgraft.kernels.logit_sum import op as op
