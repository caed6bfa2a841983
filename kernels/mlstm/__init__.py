"""``fxgraft::mlstm``: the matrix-memory recurrence of xLSTM (arXiv 2405.04517).

Linear attention with exponential input gates, sigmoid forget gates and a stabilised normaliser.
"""

from fxgraft.kernels.mlstm.op import SPEC

__all__ = ["SPEC"]
