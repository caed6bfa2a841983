"""Work of one ``linear_attention_slots`` node: that of ``linear_attention``."""

from fxgraft.kernels.linear_attention.cost import flops as flops
