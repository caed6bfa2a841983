"""Pass ``spin``: attention heads that look away from the image are suppressed, token by token."""

from fxgraft.passes.spin.picture import Choices, draw_choices, read_choices
from fxgraft.passes.spin.spin import Spin

__all__ = ["Choices", "Spin", "draw_choices", "read_choices"]
