"""Pass ``flow``: N:M sparsity chosen layer by layer, and the stage that chooses it."""

from fxgraft.passes.flow.flow import Flow
from fxgraft.passes.flow.stage import FlowCalibration

__all__ = ["Flow", "FlowCalibration"]
