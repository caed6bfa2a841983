"""Every error fxgraft raises on purpose.

Each class is one kind of mistake. Its message states what is wrong, names the place (argument,
node, module path or YAML line) and says what to do about it.
"""

from __future__ import annotations


class Error(Exception):
    """Base of all fxgraft errors.

    Args:
        problem: what is wrong, naming the argument, node, module path or file line.
        remedy: what the user can do.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}\n  what to do: {remedy}" if remedy else problem)


class InputError(Error):
    """The user gave something that cannot be used: wrong type, value, name or file."""


class CaptureError(Error):
    """A model could not be captured into one graph."""


class GraphError(Error):
    """A Program breaks a structural rule, for example after a faulty rewrite."""


class PassError(Error):
    """A pass cannot be applied to this Program, or broke one of its promises."""


class NothingMatchedError(PassError):
    """A pass found nothing to rewrite."""


class ContractError(PassError):
    """Passes are ordered or combined in a way that cannot work."""


class NumericError(PassError):
    """A rewrite changed the outputs by more than its effect allows."""


class StateError(Error):
    """A Program cannot be turned into step graphs with explicit state."""


class LoweringError(Error):
    """A backend cannot lower or export a Program."""


class SerializationError(Error):
    """A saved Program or artifact cannot be written or read."""
