"""Frontends: turn a model from anywhere into a Program.

``capture`` is the one way in; the other modules are its steps. Import torch, transformers and
fxgraft's core and kernels here; never passes, backends or runtime.
"""

from fxgraft.frontends.capture import capture

__all__ = ["capture"]
