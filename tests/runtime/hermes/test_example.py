"""The example of a system file: it runs, and the fast way gives what single steps give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fxgraft.errors import InputError
from fxgraft.runtime.hermes.config.system import System
from tests.runtime.hermes._systems import by_request

EXAMPLE = Path(__file__).parents[3] / "examples" / "systems" / "conversation.yaml"


def test_the_example_equals_its_single_steps() -> None:
    system = System.read(EXAMPLE, {"workloads.0.requests": 60})
    fast, slow = system.coordinator(), system.coordinator(stepwise=True)
    fast.run()
    slow.run()
    ours, theirs = by_request(fast), by_request(slow)
    for column in ("arrival", "first_token", "end"):
        assert len(ours[column]) == 60
        np.testing.assert_allclose(ours[column], theirs[column], rtol=0, atol=1e-9)


def test_a_wrong_key_is_named_with_its_line() -> None:
    with pytest.raises(InputError, match=r"conversation.yaml.*workloads.0.arrivals.*pace"):
        System.read(EXAMPLE, {"workloads.0.arrivals": {"kind": "poisson", "pace": 3.0}})
