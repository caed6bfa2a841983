"""Passes: typed, configurable rewrites of a Program, one folder each.

Every subpackage exports its ``Pass`` classes; ``fxgraft.registry`` finds them by name. Import
torch, fxgraft's core and ``fxgraft.kernels`` here; never frontends, backends or runtime.
"""
