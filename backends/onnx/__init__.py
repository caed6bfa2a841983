"""Backend ``onnx``: ``.onnx`` files in standard operators, run and checked in onnxruntime.

A Program's graph is translated node by node (``translate.py``) by a table with one entry per
operator: PyTorch's in ``aten/``, fxgraft's own in ``ops/``. Equal nodes are built once
(``builder.py``), sizes come from the inputs' shapes (``assembler.py``), the prefill and decode
graphs of a language model share one file of weights (``weights.py``, ``files.py``), and every
result is compared with the Program (``verify.py``).
"""

from fxgraft.backends.onnx.backend import BACKEND, OnnxBackend
from fxgraft.backends.onnx.options import OnnxOptions

__all__ = ["BACKEND", "OnnxBackend", "OnnxOptions"]
