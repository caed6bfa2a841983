"""Backends: lower a Program to something that runs, is exported, or is costed.

Each subpackage is one backend and has an object ``BACKEND``. Import torch, the libraries of the
target, and fxgraft's core and kernels here; never frontends, passes or runtime.
"""
