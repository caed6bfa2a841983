"""DSLA-Serve: layers of running requests become linear attention when memory gets short.

``policy`` decides, as a pure function; ``live`` plugs it into the engine and folds cached keys and
values into states; ``replay`` runs a log of decisions again. Import the names below from here.
"""

from fxgraft.runtime.dsla_serve.live import DslaServe
from fxgraft.runtime.dsla_serve.policy import (
    Decision,
    Memory,
    Rules,
    Running,
    Snapshot,
    decide,
    start_level,
)
from fxgraft.runtime.dsla_serve.replay import replay

__all__ = [
    "Decision",
    "DslaServe",
    "Memory",
    "Rules",
    "Running",
    "Snapshot",
    "decide",
    "replay",
    "start_level",
]
