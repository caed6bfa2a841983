"""Pass ``dsla``: softmax attention becomes linear attention with two states per head."""

from fxgraft.passes.dsla.dsla import Dsla
from fxgraft.passes.dsla.form import Form

__all__ = ["Dsla", "Form"]
