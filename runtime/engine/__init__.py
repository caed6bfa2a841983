"""The engine: many requests at once over one compiled language model.

Continuous batching with chunked prefill; growing state in blocks and fixed state in slots; prefix
reuse, preemption, cancellation; sampling options and seeds per request. Import ``Engine``,
``EngineOptions``, ``Request`` and the policy types from here.
"""

from fxgraft.runtime.engine.engine import Engine
from fxgraft.runtime.engine.options import EngineOptions
from fxgraft.runtime.engine.policy import Change, EngineView, LayerPolicy, RequestView
from fxgraft.runtime.engine.request import Request
from fxgraft.runtime.engine.stats import EngineStats

__all__ = [
    "Change",
    "Engine",
    "EngineOptions",
    "EngineStats",
    "EngineView",
    "LayerPolicy",
    "Request",
    "RequestView",
]
