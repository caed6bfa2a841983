"""Backend ``torch``: eager, or Inductor with each distinct layer compiled once."""

from fxgraft.backends.torch.backend import BACKEND, TorchCompiled, TorchOptions

__all__ = ["BACKEND", "TorchCompiled", "TorchOptions"]
