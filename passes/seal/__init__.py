"""Pass ``seal``: steer chains of thought by a vector added at paragraph breaks."""

from fxgraft.passes.seal.seal import Seal
from fxgraft.passes.seal.vector import SteeringVector

__all__ = ["Seal", "SteeringVector"]
