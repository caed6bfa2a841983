"""Exact clean-ups and fusions; one file per rewrite, each a function ``rewrite(program) -> int``.

``matching.py`` and ``effects.py`` hold what the rewrites ask about nodes, ``optimize.py`` the pass
that runs them in order. Import ``Optimize`` from here; import torch, fxgraft's core and
``fxgraft.kernels`` in here.
"""

from fxgraft.passes.optimize.optimize import Optimize

__all__ = ["Optimize"]
