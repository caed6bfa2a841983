"""HERMES: simulating multi-stage serving of language models (arXiv 2504.09775).

A request is a chain of stages, a stage runs on a client, and each client asks a step-cost table
(or another pure function) how long one step takes. ``System`` is a simulation as a file; what is
imported here is the public part.
"""

from fxgraft.runtime.hermes.compare import Comparison, compare
from fxgraft.runtime.hermes.config.system import System
from fxgraft.runtime.hermes.results.result import Result
from fxgraft.runtime.hermes.slo import Slo
from fxgraft.runtime.hermes.sweep import Point, sweep
from fxgraft.runtime.hermes.workload.workload import Workload

__all__ = ["Comparison", "Point", "Result", "Slo", "System", "Workload", "compare", "sweep"]
