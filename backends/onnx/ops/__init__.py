"""Translations of fxgraft's own ops, one file each.

Importing this registers them in ``fxgraft.backends.onnx.call.TABLE``. An op that is not here is
translated from its ``OpSpec``: by tracing its reference, or as a ``Scan`` if it has fixed states.
"""

from fxgraft.backends.onnx.ops import attention as attention
from fxgraft.backends.onnx.ops import attention_mass as attention_mass
from fxgraft.backends.onnx.ops import causal_conv1d as causal_conv1d
from fxgraft.backends.onnx.ops import causal_mask as causal_mask
from fxgraft.backends.onnx.ops import causal_pad as causal_pad
from fxgraft.backends.onnx.ops import gated_activation as gated_activation
from fxgraft.backends.onnx.ops import gated_delta_rule as gated_delta_rule
from fxgraft.backends.onnx.ops import head_gate as head_gate
from fxgraft.backends.onnx.ops import linear_attention as linear_attention
from fxgraft.backends.onnx.ops import linear_recurrence as linear_recurrence
from fxgraft.backends.onnx.ops import logit_sum as logit_sum
from fxgraft.backends.onnx.ops import mlstm as mlstm
from fxgraft.backends.onnx.ops import nm_linear as nm_linear
from fxgraft.backends.onnx.ops import rms_norm as rms_norm
from fxgraft.backends.onnx.ops import rotary as rotary
from fxgraft.backends.onnx.ops import selective_scan as selective_scan
from fxgraft.backends.onnx.ops import ssd as ssd
from fxgraft.backends.onnx.ops import steer as steer
from fxgraft.backends.onnx.ops import token_automaton as token_automaton
from fxgraft.backends.onnx.ops import wkv as wkv
