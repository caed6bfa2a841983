"""Translations of PyTorch's own operators, grouped as in its documentation.

Importing this registers them in ``fxgraft.backends.onnx.call.TABLE``. An operator that is not here
is taken apart into simpler ones by PyTorch's decompositions; if that does not help, lowering fails
and names it.
"""

from fxgraft.backends.onnx.aten import complex as complex
from fxgraft.backends.onnx.aten import convolution as convolution
from fxgraft.backends.onnx.aten import creation as creation
from fxgraft.backends.onnx.aten import elementwise as elementwise
from fxgraft.backends.onnx.aten import indexing as indexing
from fxgraft.backends.onnx.aten import matrices as matrices
from fxgraft.backends.onnx.aten import normalisation as normalisation
from fxgraft.backends.onnx.aten import reductions as reductions
from fxgraft.backends.onnx.aten import shapes as shapes
from fxgraft.backends.onnx.aten import sorting as sorting
