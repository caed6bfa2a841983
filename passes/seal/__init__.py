"""Pass ``seal``: steer chains of thought by a vector added at paragraph breaks.

``seal`` is the pass, ``automaton`` finds the breaks, ``streams`` the place; ``vector`` and
``algebra`` are what is added; ``calibration`` extracts it, with ``traces``, ``thoughts``,
``statistics`` and ``picture``. Import the names below from here.
"""

from fxgraft.passes.seal.algebra import combine, cosine, project, random_like, without
from fxgraft.passes.seal.calibration import SealCalibration
from fxgraft.passes.seal.seal import Seal
from fxgraft.passes.seal.vector import SteeringVector

__all__ = [
    "Seal",
    "SealCalibration",
    "SteeringVector",
    "combine",
    "cosine",
    "project",
    "random_like",
    "without",
]
