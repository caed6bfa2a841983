"""Backend ``flexcim``: what a Program costs on digital compute-in-memory with N:M sparsity.

Cycles, energy and utilisation per node, step-cost tables, comparisons, sweeps. ``BACKEND`` lowers;
``Hardware`` is the configuration. The cost model is that of arXiv 2504.14365 as far as it is
public; ``hardware.py`` says of every constant where it comes from.
"""

from fxgraft.backends.flexcim.backend import BACKEND, FlexcimCompiled, FlexcimOptions
from fxgraft.backends.flexcim.hardware import Hardware

__all__ = ["BACKEND", "FlexcimCompiled", "FlexcimOptions", "Hardware"]
