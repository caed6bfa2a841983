"""Ops: the semantic operations ``fxgraft::<op>`` that graphs are made of.

One folder per op, each with its definition, reference, cost and (where it has one) Triton kernel.
Importing this package registers all of them. Import torch, triton and sympy here, and from
fxgraft only ``fxgraft.errors`` and this package.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, __name__ + "."):
    if _module.ispkg:
        importlib.import_module(_module.name)
